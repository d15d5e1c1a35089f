// Charts in SVG, drawn anew where their width changes: lines with a reading cursor and zoom, bars.

const PLOT = { left: 52, right: 22, top: 22, bottom: 34 };

/** Round numbers that divide an interval into about `count` parts. */
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k === 0 ? 0 : Number((k * step).toPrecision(12)));
  return found;
}

/** Axes with labels and grid lines; `x` and `y` map values to places. */
function axes(width, height, x, y, xTicks, yTicks, { xLabel, xFormat = short, yFormat = short }) {
  const bottom = height - PLOT.bottom;
  const between = (found) => (found.length > 1 ? found[1] - found[0] : 0);
  return s('g', { class: 'axes', 'aria-hidden': true },
    yTicks.map((value) => [
      s('line', { class: 'gridline', x1: PLOT.left, x2: width - PLOT.right, y1: y(value), y2: y(value) }),
      s('text', { x: PLOT.left - 8, y: y(value) + 4, 'text-anchor': 'end' }, yFormat(value, between(yTicks))),
    ]),
    s('line', { class: 'axis', x1: PLOT.left, x2: width - PLOT.right, y1: bottom, y2: bottom }),
    xTicks.map((value) => s('text', { x: x(value), y: bottom + 17, 'text-anchor': 'middle' }, xFormat(value, between(xTicks)))),
    s('text', { class: 'title', x: width - PLOT.right, y: height - 3, 'text-anchor': 'end' }, xLabel));
}

/** The place in the rising array `values` of what is nearest to `value`. */
function nearest(values, value) {
  let low = 0;
  let high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < value) low = middle; else high = middle;
  }
  return Math.abs(values[low] - value) <= Math.abs(values[high] - value) ? low : high;
}

let charts = 0;

/**
 * Lines over a common x, with a legend that tells the values under the cursor.
 *
 * Hover, or focus and the arrow keys, move the cursor. Dragging zooms; on a chart that has the focus so do
 * the wheel and + and -; a double click, 0 or the button shows all again.
 *
 * Args: label, for who can't see it; series, each {name, x, y, color (1 to 8, or 0 for none of its own), dash};
 * xLabel; yFormat for values, axisFormat for the axis; yDomain [low, high] or undefined; marks, vertical lines {x, text}.
 */
function lineChart({ label, series, xLabel, yFormat = short, axisFormat = yFormat, yDomain, height = 250, marks = [] }) {
  const id = `chart${++charts}`;
  const all = [...new Set(series.flatMap((one) => Array.from(one.x)))].sort((a, b) => a - b);
  const extent = [all[0], all.length > 1 ? all[all.length - 1] : all[0] + 1];
  let shown = extent;
  let at = null;
  let map = null;

  const readout = h('output', { class: 'hidden', 'aria-live': 'polite' });
  const where = h('span', { class: 'where' });
  const values = series.map(() => h('b', { class: 'value' }));
  const reset = h('button', { type: 'button', class: 'small', hidden: true, onclick: () => zoom(extent) }, 'Show all');
  const many = series.length > 8; // of one colour then
  const legend = h('div', { class: 'legend' },
    many ? null : series.map((one, k) => h('span', { class: 'key' },
      s('svg', { class: 'swatch', width: 18, height: 8, 'aria-hidden': true },
        s('line', { class: `line color${one.color}`, x1: 0, x2: 18, y1: 4, y2: 4, 'stroke-dasharray': one.dash })),
      one.name, ' ', values[k])), where, reset);
  const hairline = s('line', { class: 'hairline', visibility: 'hidden' });
  const dots = series.map((one) => s('circle', { class: `dot color${one.color}`, r: 3.5, visibility: 'hidden' }));
  const brush = s('rect', { class: 'brush', visibility: 'hidden' });
  const svg = s('svg', {
    height, tabindex: 0, role: 'group', 'aria-roledescription': 'chart', 'aria-describedby': `${id}help`,
    'aria-label': label,
  });
  const plot = h('div', { class: 'plot' }, svg);
  const node = h('div', { class: 'chart' }, legend, plot, readout,
    h('p', { class: 'hidden', id: `${id}help` }, 'Arrow keys read values, plus and minus zoom, 0 shows all.'));

  function draw(width) {
    const visible = series.flatMap((one) => Array.from(one.y).filter((_, k) => one.x[k] >= shown[0] && one.x[k] <= shown[1]));
    let [low, high] = yDomain && shown === extent ? yDomain : [least(visible), greatest(visible)];
    if (!visible.length) [low, high] = yDomain ?? [0, 1];
    if (!(high > low)) [low, high] = [low - 0.5 * Math.abs(low || 1), low + 0.5 * Math.abs(low || 1)];
    const x = (value) => PLOT.left + (value - shown[0]) / (shown[1] - shown[0]) * (width - PLOT.left - PLOT.right);
    const y = (value) => height - PLOT.bottom - (value - low) / (high - low) * (height - PLOT.top - PLOT.bottom);
    map = { width, x, y, back: (place) => shown[0] + (place - PLOT.left) / (width - PLOT.left - PLOT.right) * (shown[1] - shown[0]) };
    svg.setAttribute('width', width);
    svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    const clip = s('clipPath', { id }, s('rect', {
      x: PLOT.left - 2, y: 0, width: width - PLOT.left - PLOT.right + 4, height: height - PLOT.bottom + 2,
    }));
    const path = (one) => Array.from(one.x, (value, k) => `${k ? 'L' : 'M'}${x(value).toFixed(1)} ${y(one.y[k]).toFixed(1)}`).join('')
      + (one.x.length === 1 ? 'h0' : ''); // a point is drawn as a line of no length
    const inside = marks.filter((mark) => mark.x >= shown[0] && mark.x <= shown[1]);
    svg.replaceChildren(clip,
      axes(width, height, x, y, ticks(...shown, width / 90).filter(Number.isInteger), ticks(low, high, 5), { xLabel, yFormat: axisFormat }),
      s('g', null, inside.map((mark) => {
        const toLeft = x(mark.x) > width * 0.6;
        return s('g', { class: 'mark' },
          s('line', { x1: x(mark.x), x2: x(mark.x), y1: PLOT.top - 18, y2: height - PLOT.bottom }),
          s('text', { x: x(mark.x) + (toLeft ? -5 : 5), y: PLOT.top - 8, 'text-anchor': toLeft ? 'end' : 'start' }, mark.text));
      })),
      s('g', { 'clip-path': `url(#${id})` }, series.map((one) =>
        s('path', { class: `line color${one.color}`, d: path(one), 'stroke-dasharray': one.dash }))),
      hairline, ...dots, brush);
    read(at);
  }

  function read(value, aloud = false) {
    at = value === null ? null : Math.min(Math.max(value, shown[0]), shown[1]);
    const place = at === null ? null : nearest(all, at);
    const visibility = at === null ? 'hidden' : 'visible';
    hairline.setAttribute('visibility', visibility);
    where.textContent = at === null ? '' : `at ${xLabel} ${thousands(all[place])}`;
    if (at !== null) {
      for (const end of ['x1', 'x2']) hairline.setAttribute(end, map.x(all[place]));
      hairline.setAttribute('y1', PLOT.top);
      hairline.setAttribute('y2', height - PLOT.bottom);
    }
    const told = series.map((one, k) => {
      const there = at === null || !one.x.length ? -1 : nearest(one.x, all[place]);
      values[k].textContent = there < 0 ? '' : yFormat(one.y[there]);
      dots[k].setAttribute('visibility', there < 0 || many ? 'hidden' : 'visible');
      if (there >= 0) {
        dots[k].setAttribute('cx', map.x(one.x[there]));
        dots[k].setAttribute('cy', map.y(one.y[there]));
      }
      return `${one.name} ${values[k].textContent}`;
    });
    if (many && at !== null) {
      const y = pointer === null ? null : pointer;
      const close = y === null ? 0 : series.reduce((found, one, k) => {
        const distance = Math.abs(map.y(one.y[nearest(one.x, all[place])]) - y);
        return distance < found.distance ? { k, distance } : found;
      }, { k: 0, distance: Infinity }).k;
      where.textContent += `: ${told[close]}`;
      svg.querySelectorAll('path.line').forEach((line, k) => line.classList.toggle('strong', k === close));
    }
    if (aloud) readout.textContent = at === null ? '' : `${xLabel} ${all[place]}: ${told.slice(0, 10).join(', ')}`;
  }

  function zoom([low, high]) {
    const whole = extent[1] - extent[0];
    if (high - low < whole / 1000) return;
    low = Math.max(extent[0], low);
    high = Math.min(extent[1], high);
    shown = high - low >= whole * 0.999 ? extent : [low, high];
    reset.hidden = shown === extent;
    draw(map.width);
  }

  const around = (value, factor) => zoom([value - (value - shown[0]) * factor, value + (shown[1] - value) * factor]);
  const placeOf = (event) => event.clientX - svg.getBoundingClientRect().left;
  let from = null;
  let pointer = null;
  svg.addEventListener('pointermove', (event) => {
    pointer = event.clientY - svg.getBoundingClientRect().top;
    read(map.back(placeOf(event)));
    if (from === null) return;
    const [left, right] = [from, placeOf(event)].sort((a, b) => a - b);
    fill(brush, { x: left, width: right - left, y: PLOT.top, height: height - PLOT.top - PLOT.bottom, visibility: right - left > 5 ? 'visible' : 'hidden' }, []);
  });
  svg.addEventListener('pointerdown', (event) => {
    if (event.pointerType === 'mouse' && event.button === 0) {
      from = placeOf(event);
      svg.setPointerCapture(event.pointerId);
    }
  });
  svg.addEventListener('pointerup', (event) => {
    brush.setAttribute('visibility', 'hidden');
    if (from !== null && Math.abs(placeOf(event) - from) > 5) zoom([from, placeOf(event)].map(map.back).sort((a, b) => a - b));
    from = null;
  });
  svg.addEventListener('pointerleave', () => { pointer = null; if (document.activeElement !== svg) read(null); });
  svg.addEventListener('blur', () => read(null));
  svg.addEventListener('dblclick', () => zoom(extent));
  svg.addEventListener('wheel', (event) => {
    if (document.activeElement !== svg) return;
    event.preventDefault();
    around(map.back(placeOf(event)), event.deltaY > 0 ? 1.25 : 0.8);
  }, { passive: false });
  svg.addEventListener('keydown', (event) => {
    const middle = at ?? (shown[0] + shown[1]) / 2;
    const move = (by) => {
      const place = at === null ? nearest(all, shown[0]) : nearest(all, at) + by;
      read(all[Math.min(Math.max(place, 0), all.length - 1)], true);
    };
    const actions = {
      ArrowLeft: () => move(-1), ArrowRight: () => move(1),
      PageUp: () => move(-Math.ceil(all.length / 10)), PageDown: () => move(Math.ceil(all.length / 10)),
      Home: () => read(shown[0], true), End: () => read(shown[1], true),
      '+': () => around(middle, 0.7), '=': () => around(middle, 0.7), '-': () => around(middle, 1.4), 0: () => zoom(extent),
    };
    if (!(event.key in actions) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    actions[event.key]();
  });
  onWidth(plot, draw);
  return node;
}

/**
 * A histogram of positive numbers over a logarithmic axis, with a threshold that may move.
 *
 * `domain` [low, high] is that of the axis, so that several can be compared. What it gives has `node` and
 * `setThreshold(value)`; `threshold` null draws none.
 */
function logHistogram({ label, values, domain, threshold, height = 120, bins = 40 }) {
  const [low, high] = domain.map(Math.log10);
  const counts = new Array(bins).fill(0);
  for (const value of values) {
    const place = Math.floor((Math.log10(Math.max(value, domain[0])) - low) / (high - low) * bins);
    counts[Math.min(bins - 1, Math.max(0, place))]++;
  }
  const most = Math.max(...counts, 1);
  const svg = s('svg', { height, role: 'img', 'aria-label': label });
  const node = h('div', { class: 'plot' }, svg);
  let redraw = () => {};
  onWidth(node, (width) => {
    const x = (value) => PLOT.left / 4 + (Math.log10(value) - low) / (high - low) * (width - PLOT.left / 2);
    const bottom = height - 20;
    const step = (width - PLOT.left / 2) / bins;
    redraw = () => {
      svg.setAttribute('width', width);
      svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
      const powers = [];
      for (let k = Math.ceil(low); k <= Math.floor(high); k++) powers.push(k);
      const centre = (k) => 10 ** (low + (k + 0.5) / bins * (high - low));
      svg.replaceChildren(
        s('line', { class: 'axis', x1: 0, x2: width, y1: bottom, y2: bottom }),
        ...powers.map((k) => s('text', { x: x(10 ** k), y: height - 4, 'text-anchor': 'middle' }, short(10 ** k))),
        ...counts.map((count, k) => s('rect', {
          class: threshold !== null && centre(k) > threshold ? 'bar over' : 'bar',
          x: PLOT.left / 4 + k * step + 0.5, width: Math.max(1, step - 1),
          y: bottom - count / most * (bottom - 8), height: count / most * (bottom - 8),
        })),
        ...(threshold === null ? [] : [s('line', { class: 'threshold', x1: x(threshold), x2: x(threshold), y1: 0, y2: bottom })]));
    };
    redraw();
  });
  return { node, setThreshold(value) { threshold = value; redraw(); } };
}
