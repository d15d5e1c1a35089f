// The sections on one run: each takes what the report says and gives a node, or null where it says nothing.

const COLOR = { train: 2, validation: 1 };

/** A section with a heading, and its place in the contents. */
function section(id, title, ...children) {
  return h('section', { id, 'aria-labelledby': `${id}-title` }, h('h2', { id: `${id}-title` }, title), ...children);
}

const banner = (kind, text) => h('p', { class: `banner ${kind}`, role: 'note' },
  h('strong', null, kind === 'warning' ? 'Warning. ' : 'Note. '), text);

function summarySection(run) {
  const command = (text) => h('code', { class: 'command' }, text);
  return section('summary', 'Summary',
    run.warnings.map((text) => banner('warning', text)),
    run.notices.map((text) => banner('notice', text)),
    h('dl', { class: 'headline' }, run.headline.map((one) => h('div', null,
      h('dt', null, one.label), h('dd', null, h('b', null, one.value), h('small', null, one.note))))),
    h('div', { class: 'facts' }, run.sections.map((part) => h('div', null, h('h3', null, part.title),
      h('dl', null, part.pairs.map(([term, text]) => h('div', null,
        h('dt', null, term), h('dd', null, term === 'Command' ? command(text) : text))))))),
    folded('Every field of the config', () => table('Config', ['field', 'value'], run.config, { numeric: false })));
}

const axisPercent = (share, step) => `${short(100 * share, 100 * step)} %`;

const METRICS = {
  accuracy: { title: 'Accuracy', format: percent, axisFormat: axisPercent },
  loss: { title: 'Loss, nats', format: short },
  gradient_norm: { title: 'Gradient norm before the clip, mean', format: short },
  clipped_share: { title: 'Share of steps clipped', format: (x) => percent(x, 1), axisFormat: axisPercent },
};

function curvesSection(run) {
  const shown = Object.keys(METRICS).filter((metric) => metric in run.curves);
  if (!shown.length) return null;
  const marks = run.best_step ? [{ x: run.best_step, text: `selected: step ${thousands(run.best_step)}` }] : [];
  return section('curves', 'Learning curves',
    h('p', { class: 'lead' }, 'Training values are means over the steps since the last report. Axes span what is drawn, not from zero. Hover to read; drag to zoom.'),
    h('div', { class: 'grid' }, shown.map((metric) => {
      const { title, format, axisFormat } = METRICS[metric];
      const splits = Object.entries(run.curves[metric]);
      return h('figure', null, h('figcaption', null, title),
        lineChart({
          label: `${title} over training steps`, xLabel: 'step', yFormat: format, axisFormat,
          marks: metric === 'accuracy' || metric === 'loss' ? marks : [],
          series: splits.map(([name, curve]) => ({ name, x: curve.steps, y: curve.values, color: COLOR[name] ?? 3 })),
        }),
        folded('As a table', () => {
          const steps = [...new Set(splits.flatMap(([, curve]) => curve.steps))].sort((a, b) => a - b);
          const cells = splits.map(([, curve]) => new Map(curve.steps.map((step, k) => [step, format(curve.values[k])])));
          return table(title, ['step', ...splits.map(([name]) => name)],
            steps.map((step) => [thousands(step), ...cells.map((cell) => cell.get(step) ?? '')]));
        }));
    })));
}

function gradientsSection(run) {
  const gradients = run.gradients;
  if (!gradients || !gradients.tensors[0].norms.length) return null;
  const positive = gradients.tensors.flatMap((one) => one.norms).concat(gradients.units.flatMap((one) => one.norms)).filter((x) => x > 0);
  const isClipping = gradients.units.length > 0;
  const ends = [...positive, ...(isClipping ? [gradients.threshold] : [])];
  const domain = [least(ends) * 0.8, greatest(ends) * 1.25];
  const over = (norms, threshold) => norms.filter((norm) => norm > threshold).length / norms.length;
  const anyOver = (threshold) => gradients.tensors[0].norms.filter((_, k) => gradients.units.some((unit) => unit.norms[k] > threshold)).length / gradients.tensors[0].norms.length;
  const listeners = [];
  const panel = (name, note, norms, threshold) => {
    const histogram = logHistogram({ label: `Histogram of the gradient norms of ${name}`, values: norms, domain, threshold });
    const share = h('b', { class: 'value' });
    if (threshold !== null) {
      listeners.push((value) => {
        histogram.setThreshold(value);
        share.textContent = `${percent(over(norms, value), 1)} clipped`;
      });
    }
    return h('figure', { class: 'small' }, h('figcaption', null, h('code', null, name), threshold === null ? null : share,
      note ? h('small', null, note) : null), histogram.node);
  };
  const total = h('output', { for: 'threshold', 'aria-live': 'polite' });
  const [low, high] = domain.map(Math.log10);
  const slider = h('input', {
    id: 'threshold', type: 'range', min: 0, max: 1000,
    oninput: () => set(10 ** (low + slider.value / 1000 * (high - low))),
  });
  const set = (value) => {
    listeners.forEach((listener) => listener(value));
    const text = `${short(value)}: ${percent(anyOver(value), 1)} of these steps clip something`;
    total.textContent = text;
    slider.setAttribute('aria-valuetext', text);
  };
  const reset = () => {
    slider.value = Math.round((Math.log10(gradients.threshold) - low) / (high - low) * 1000);
    set(gradients.threshold);
  };
  const alone = gradients.units.filter((unit) => unit.tensors.length === 1).map((unit) => unit.tensors[0]);
  const rest = gradients.tensors.filter((one) => !alone.includes(one.name));
  const node = section('gradients', 'Gradient norms against the clip',
    h('p', { class: 'lead' },
      `Norms before the clip, at steps ${thousands(gradients.first_step)} to ${thousands(gradients.last_step)}. `,
      isClipping ? 'A threshold is well chosen where it stands at the edge of what is usual: most steps pass, the few large ones are held back. '
        + 'Move it to see which share it would have clipped.' : 'This run clips nothing.'),
    isClipping ? h('div', { class: 'control' }, h('label', { for: 'threshold' }, 'Threshold'), slider, total,
      h('button', { type: 'button', class: 'small', onclick: reset }, `The run's own, ${short(gradients.threshold)}`)) : null,
    isClipping ? h('h3', null, gradients.unit === 'tensor' ? 'What is clipped, each by its own norm' : 'What is clipped by one norm') : null,
    h('div', { class: 'grid three' }, gradients.units.map((unit) => panel(unit.name,
      unit.tensors.length > 1 ? `jointly: ${unit.tensors.map((name) => name.split('/').pop()).join(', ')}` : '', unit.norms, gradients.threshold))),
    rest.length ? h('h3', null, isClipping ? 'Other tensors, and the parts of joint norms' : 'Tensors') : null,
    h('div', { class: 'grid three' }, rest.map((one) => panel(one.name, one.clipped ? 'clipped as a part' : 'not clipped', one.norms, null))),
    folded('As a table', () => {
      const quantile = (norms, share) => short([...norms].sort((a, b) => a - b)[Math.floor(share * (norms.length - 1))]);
      const row = (one, isUnit) => [one.name, quantile(one.norms, 0.5), quantile(one.norms, 0.9), quantile(one.norms, 1),
        isUnit ? percent(over(one.norms, gradients.threshold), 1) : ''];
      return table('Gradient norms', ['tensor or unit', 'median', '90 %', 'largest', 'clipped'],
        [...gradients.units.map((one) => row(one, true)), ...rest.map((one) => row(one, false))]);
    }));
  if (isClipping) reset();
  return node;
}

function confusionSection(run) {
  const score = run.score;
  if (!score) return null;
  const { confusion } = score;
  const classes = confusion.length;
  const wrong = Math.max(1, ...confusion.flatMap((row, t) => row.filter((_, p) => p !== t)));
  const told = h('p', { class: 'told', 'aria-live': 'polite' }, 'Hover over a cell, or move among them with the arrow keys.');
  const tell = (t, p) => {
    const count = confusion[t][p];
    const of = score.per_class[t].count;
    told.textContent = `${thousands(count)} of ${thousands(of)} images of class ${t} (${of ? percent(count / of) : '-'}) `
      + (t === p ? 'are read right.' : `are read as ${p}.`);
  };
  const cells = confusion.map((row, t) => row.map((count, p) => {
    const strength = t === p ? count / Math.max(1, score.per_class[t].count) : Math.sqrt(count / wrong);
    const cell = h('td', { tabindex: t || p ? -1 : 0, class: t === p ? 'right' : count ? 'wrong' : 'none' }, count ? String(count) : '·');
    cell.style.setProperty('--strength', `${Math.round(100 * strength)}%`);
    cell.addEventListener('pointerenter', () => tell(t, p));
    cell.addEventListener('focus', () => tell(t, p));
    return cell;
  }));
  const body = h('tbody', { onkeydown: (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    const t = cells.findIndex((row) => row.includes(event.target));
    if (!move || t < 0) return;
    event.preventDefault();
    const p = cells[t].indexOf(event.target);
    const next = cells[Math.min(classes - 1, Math.max(0, t + move[0]))][Math.min(classes - 1, Math.max(0, p + move[1]))];
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  } }, cells.map((row, t) => h('tr', null, h('th', { scope: 'row' }, String(t)), row,
    h('td', { class: 'rate' }, score.per_class[t].accuracy === null ? '-' : percent(score.per_class[t].accuracy, 1)))));
  return section('confusion', 'Confusion: what is taken for what',
    h('p', { class: 'lead' }, `Rows: the true class; columns: the predicted one; ${thousands(score.count)} ${run.split} images. `,
      'Mistakes are the darker the more frequent they are.'),
    h('div', { class: 'scroll' }, h('table', { class: `confusion ${classes > 12 ? 'many' : ''}` },
      h('caption', { class: 'hidden' }, 'Confusion matrix'),
      h('thead', null, h('tr', null, h('th', { scope: 'col' }, 'true'),
        confusion.map((_, p) => h('th', { scope: 'col', 'aria-label': `predicted ${p}` }, String(p))), h('th', { scope: 'col' }, 'right'))), body)), told);
}

function calibrationSection(run) {
  const score = run.score;
  if (!score) return null;
  const bins = score.calibration_bins;
  const most = Math.max(...bins.map((bin) => bin.count));
  const height = 300;
  const svg = s('svg', { height, role: 'img', 'aria-label': `Reliability diagram; calibration error ${percent(score.calibration_error)}. The table below has its values.` });
  const plot = h('div', { class: 'plot narrow' }, svg);
  onWidth(plot, (width) => {
    const lower = 56;
    const x = (value) => PLOT.left + value * (width - PLOT.left - PLOT.right);
    const y = (value) => height - PLOT.bottom - lower - value * (height - PLOT.top - PLOT.bottom - lower);
    const floor = height - PLOT.bottom;
    svg.setAttribute('width', width);
    svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    const grid = [0, 0.25, 0.5, 0.75, 1];
    svg.replaceChildren(
      s('g', { class: 'axes' },
        grid.map((value) => [
          s('line', { class: 'gridline', x1: PLOT.left, x2: width - PLOT.right, y1: y(value), y2: y(value) }),
          s('text', { x: PLOT.left - 8, y: y(value) + 4, 'text-anchor': 'end' }, `${100 * value} %`),
          s('text', { x: x(value), y: floor + 17, 'text-anchor': 'middle' }, `${100 * value} %`),
        ]),
        s('line', { class: 'axis', x1: PLOT.left, x2: width - PLOT.right, y1: floor, y2: floor }),
        s('text', { class: 'title', x: width - PLOT.right, y: height - 2, 'text-anchor': 'end' }, 'probability of the predicted class'),
        s('text', { x: PLOT.left - 8, y: floor - 2, 'text-anchor': 'end' }, 'images')),
      s('line', { class: 'diagonal', x1: x(0), y1: y(0), x2: x(1), y2: y(1) }),
      ...bins.filter((bin) => bin.count).flatMap((bin) => {
        const inset = 1.5;
        const title = () => s('title', null, `${percent(bin.low, 0)} to ${percent(bin.high, 0)}: ${thousands(bin.count)} images, ${percent(bin.accuracy, 1)} right, ${percent(bin.confidence, 1)} on average given to it`);
        const size = Math.max(1, bin.count / most * (lower - 22));
        return [
          s('rect', { class: 'bar', x: x(bin.low) + inset, width: x(bin.high) - x(bin.low) - 2 * inset, y: y(bin.accuracy), height: y(0) - y(bin.accuracy) }, title()),
          s('line', { class: 'gap', x1: x(bin.confidence), x2: x(bin.confidence), y1: y(bin.confidence), y2: y(bin.accuracy) }),
          s('circle', { class: 'dot color2', cx: x(bin.confidence), cy: y(bin.accuracy), r: 3 }, title()),
          s('rect', { class: 'bar faint', x: x(bin.low) + inset, width: x(bin.high) - x(bin.low) - 2 * inset, y: floor - size, height: size }, title()),
        ];
      }));
  });
  return section('calibration', 'Calibration: does it know how sure it may be?',
    h('p', { class: 'lead' }, 'Images by the probability that the predicted class is given. Were the network calibrated, of those with 80 % four in five were right, and the bars ended on the diagonal. ',
      'The distance to it, averaged over all images, is the calibration error: ', h('b', null, percent(score.calibration_error)), '.'),
    h('figure', null, plot),
    folded('As a table', () => table('Calibration', ['probability', 'images', 'right', 'mean probability'],
      bins.map((bin) => [`${percent(bin.low, 0)} to ${percent(bin.high, 0)}`, thousands(bin.count),
        bin.count ? percent(bin.accuracy, 1) : '', bin.count ? percent(bin.confidence, 1) : '']))));
}

/** The digits of the report: their pixels beside what is said of each. */
function decodeDigits(digits) {
  if (!digits) return [];
  const { height, width, pixels, list } = digits;
  const all = decodeBytes(pixels);
  const size = height * width;
  return list.map((one, k) => ({ ...one, height, width, pixels: all.subarray(k * size, (k + 1) * size) }));
}

function hardestSection(run, digits, watch) {
  const hardest = digits.filter((one) => one.hardest);
  if (!hardest.length) return null;
  return section('hardest', `The hardest ${run.split} digits`,
    h('p', { class: 'lead' }, 'Those of the highest loss. ', watch ? 'Choose one to watch how it is read.' : ''),
    h('ul', { class: 'digits' }, hardest.map((one) => {
      const label = `Number ${one.index}: a ${one.label}, read as ${one.predicted} with ${percent(one.probability, 0)}; loss ${one.loss.toFixed(2)}`;
      const inside = [drawDigit(h('canvas', { 'aria-hidden': true }), one.pixels, one.height, one.width),
        h('span', null, h('b', null, `${one.label}`), ' read as ', h('b', { class: one.label === one.predicted ? '' : 'bad' }, `${one.predicted}`)),
        h('small', null, `${percent(one.probability, 0)} sure`), h('small', null, `loss ${one.loss.toFixed(1)}`)];
      return h('li', null, watch ? h('button', { type: 'button', class: 'digit', 'aria-label': `${label}. Watch it.`, onclick: () => watch(one) }, inside)
        : h('div', { class: 'digit', role: 'img', 'aria-label': label }, inside));
    })));
}

function soonSection(run) {
  const soon = run.reading?.soon;
  if (!soon) return null;
  const x = soon.accuracy.map((_, k) => k + 1);
  return section('how-soon', 'How soon it knows',
    h('p', { class: 'lead' }, `Over all ${run.split} images: how many are named right after so many steps, and of how many it has made up its mind: `,
      'from then on its answer stays. Half of all are decided by step ', h('b', null, `${thousands(soon.median)} of ${thousands(x.length)}`), '.'),
    h('figure', null, lineChart({
      label: 'Share of images read right, and decided, after each step', xLabel: 'step', yFormat: (value) => percent(value, 1), axisFormat: axisPercent, yDomain: [0, 1],
      marks: [{ x: soon.median, text: `half decided: ${thousands(soon.median)}` }],
      series: [{ name: 'read right', x, y: soon.accuracy, color: 1 }, { name: 'decided', x, y: soon.decided, color: 2, dash: '5 3' }],
    })),
    folded('As a table', () => {
      const every = Math.max(1, Math.floor(x.length / 28));
      return table('How soon it knows', ['step', 'read right', 'decided'],
        x.filter((step) => step % every === 0).map((step) => [thousands(step), percent(soon.accuracy[step - 1], 1), percent(soon.decided[step - 1], 1)]));
    }));
}
