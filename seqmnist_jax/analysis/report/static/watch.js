// "Watch it read": a player that runs through the steps of one reading, live or recorded.

const AXIS = 44; // left of the plots over time, so that they stand above one another
const UNREAD = [58, 70, 92];
const CURRENT = [255, 166, 40];

/** A recorded reading of digit `k` in the form that beginReading gives. */
function recordedReadings(reading) {
  const { recorded, view, classes } = reading;
  const probabilities = recorded.probabilities && decodeBytes(recorded.probabilities);
  const leaders = recorded.leaders && decodeBytes(recorded.leaders);
  const states = recorded.states && new Int8Array(decodeBytes(recorded.states).buffer);
  const columns = recorded.states ? Math.ceil(view.time / recorded.stride) : 0;
  return (k) => ({
    time: view.time, done: view.time, classes, units: recorded.units ?? 0, stride: recorded.stride ?? 1,
    leaders: leaders && leaders.subarray(k * view.time, (k + 1) * view.time),
    probabilities: probabilities && Float32Array.from(probabilities.subarray(k * view.time * classes, (k + 1) * view.time * classes), (x) => x / 255),
    states: states && Float32Array.from(states.subarray(k * columns * recorded.units, (k + 1) * columns * recorded.units), (x) => x / 127),
  });
}

/** The most probable class after so many steps. */
function leader(reading, steps) {
  if (reading.leaders) return reading.leaders[steps - 1];
  let best = 0;
  const from = (steps - 1) * reading.classes;
  for (let k = 1; k < reading.classes; k++) if (reading.probabilities[from + k] > reading.probabilities[from + best]) best = k;
  return best;
}

/** The first step, from 1, from which the most probable class stays what it is at the end. */
function decidedAt(reading) {
  const final = leader(reading, reading.time);
  let step = reading.time;
  while (step > 1 && leader(reading, step - 1) === final) step--;
  return step;
}

/** The image that appears as it is read: what is unread is blue-grey, what is being read orange. */
function readingImage(view) {
  const { height, width, features } = view;
  const canvas = h('canvas', { class: 'reading', width, height, role: 'img', 'aria-label': 'The pixels read so far' });
  const context = canvas.getContext('2d');
  const image = context.createImageData(width, height);
  return {
    canvas,
    show(pixels, steps) {
      for (let k = 0; k < width * height; k++) image.data.set([...UNREAD, 255], 4 * k);
      for (let at = 0; at < steps * features; at++) {
        const place = view.order ? view.order[at] : at;
        const value = pixels[place];
        const isNow = features === 1 && at === steps - 1 && steps < view.time;
        image.data.set(isNow ? [...CURRENT, 255] : [value, value, value, 255], 4 * place);
      }
      context.putImageData(image, 0, 0);
    },
  };
}

/** A bar for the probability of each class. */
function probabilityBars(classes) {
  const rows = Array.from({ length: classes }, (_, k) => {
    const fillBar = h('i');
    const value = h('span', { class: 'value' });
    return { fillBar, value, row: h('li', null, h('b', null, String(k)), h('span', { class: 'track' }, fillBar), value) };
  });
  return {
    node: h('ul', { class: `bars ${classes > 12 ? 'many' : ''}`, 'aria-label': 'Probability of each class now' }, rows.map((one) => one.row)),
    /** `blue` is the class that has this colour in the lines too. */
    show(probabilities, blue) {
      const most = probabilities ? probabilities.indexOf(Math.max(...probabilities)) : -1;
      rows.forEach(({ fillBar, value, row }, k) => {
        const p = probabilities ? probabilities[k] : 0;
        fillBar.style.transform = `scaleX(${p.toFixed(4)})`;
        value.textContent = probabilities ? percent(p, p > 0.9995 || p < 0.0005 ? 0 : 1) : '';
        row.classList.toggle('leads', k === most);
        row.classList.toggle('blue', k === blue);
      });
    },
  };
}

/** All classes' probabilities over the steps, the true one and its rivals in colour. */
function probabilityLines() {
  const height = 205;
  const svg = s('svg', { height, role: 'img', 'aria-label': 'Probability of each class over the steps' });
  const legend = h('div', { class: 'legend' });
  const plot = h('div', { class: 'plot seek' }, svg);
  let [reading, label, decided, width, at] = [null, null, null, 0, 0];
  // A step ends where its column of the hidden state below does.
  const x = (step) => AXIS + step / reading.time * (width - AXIS);
  const y = (p) => height - 24 - p * (height - 24 - 24);
  const veil = s('rect', { class: 'veil', y: 20, height: height - 43 });
  const cursor = s('line', { class: 'cursor', y1: 20, y2: height - 24 });

  function colored() {
    const led = new Array(reading.classes).fill(0);
    for (let step = 1; step <= reading.done; step++) led[leader(reading, step)]++;
    const final = leader(reading, reading.done);
    const order = led.map((_, k) => k).sort((a, b) => led[b] - led[a]);
    return [...new Set([label ?? final, final, ...order])].slice(0, 5);
  }

  function draw() {
    if (!reading || !width || !reading.done) return;
    svg.setAttribute('width', width);
    svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    const strong = colored();
    const every = Math.max(1, Math.floor(reading.done / (2 * width)));
    const path = (k) => {
      let text = '';
      for (let t = 0; t < reading.done; t += every) text += `${t ? 'L' : 'M'}${x(t + 1).toFixed(1)} ${y(reading.probabilities[t * reading.classes + k]).toFixed(1)}`;
      return text;
    };
    const line = (k) => s('path', { class: `line color${strong.indexOf(k) + 1}`, d: path(k) });
    const weak = Array.from({ length: reading.classes }, (_, k) => k).filter((k) => !strong.includes(k));
    svg.replaceChildren(
      s('g', { class: 'axes' },
        [0, 0.5, 1].map((p) => [
          s('line', { class: 'gridline', x1: AXIS, x2: width, y1: y(p), y2: y(p) }),
          s('text', { x: AXIS - 8, y: y(p) + 4, 'text-anchor': 'end' }, `${100 * p} %`),
        ]),
        ticks(0, reading.time, width / 80).filter((step) => step > 0 && step < reading.time * 0.97).map((step) =>
          s('text', { x: x(step), y: height - 7, 'text-anchor': 'middle' }, String(step)))),
      ...weak.map(line), ...[...strong].reverse().map(line), veil,
      ...(decided === null ? [] : [s('g', { class: 'mark' },
        s('line', { x1: x(decided), x2: x(decided), y1: 0, y2: height - 24 }),
        s('text', { x: x(decided) + (decided > reading.time / 2 ? -6 : 6), y: 11, 'text-anchor': decided > reading.time / 2 ? 'end' : 'start' }, `decided: step ${decided}`))]),
      cursor);
    legend.replaceChildren(...strong.map((k, place) => h('span', { class: 'key' },
      s('svg', { class: 'swatch', width: 18, height: 8, 'aria-hidden': true }, s('line', { class: `line color${place + 1}`, x1: 0, x2: 18, y1: 4, y2: 4 })),
      `${k}`, k === label ? ' (true)' : '')), weak.length ? h('span', { class: 'key muted' }, 'others grey') : '');
    move(at);
  }

  function move(step) {
    at = step;
    if (!reading || !width) return;
    const place = step ? x(step) : AXIS;
    cursor.setAttribute('transform', `translate(${place} 0)`);
    veil.setAttribute('x', place);
    veil.setAttribute('width', Math.max(0, width - place));
  }

  onWidth(plot, (now) => { width = now; draw(); });
  return {
    node: h('div', null, legend, plot), plot, move,
    show(next, nextLabel) {
      [reading, label] = [next, nextLabel];
      decided = reading.done === reading.time ? decidedAt(reading) : null;
      draw();
    },
  };
}

/** The two most probable classes at some of the steps. */
function probabilityTable(reading) {
  const every = Math.max(1, Math.round(reading.time / 28));
  const steps = Array.from({ length: reading.done }, (_, k) => k + 1).filter((step) => step % every === 0);
  return table('Probabilities', ['step', 'most probable', '', 'next', ''], steps.map((step) => {
    const now = Array.from(reading.probabilities.subarray((step - 1) * reading.classes, step * reading.classes), (p, k) => [p, k]);
    return [String(step), ...now.sort((a, b) => b[0] - a[0]).slice(0, 2).flatMap(([p, k]) => [String(k), percent(p, 1)])];
  }));
}

/** The hidden state over the steps, a row for each unit. */
function stateMap() {
  const canvas = h('canvas', { role: 'img', 'aria-label': 'Hidden state: a row for each unit, a column for each step' });
  const veil = h('div', { class: 'veil' });
  const cursor = h('div', { class: 'cursor' });
  const inside = h('div', { class: 'states seek' }, canvas, veil, cursor);
  let reading = null;
  let drawn = 0;

  function draw(from) {
    const columns = Math.ceil(reading.time / reading.stride);
    if (canvas.width !== columns || canvas.height !== reading.units || from === 0) [canvas.width, canvas.height] = [columns, reading.units];
    const until = Math.floor((reading.done + reading.stride - 1) / reading.stride);
    if (until <= from) return;
    const image = new ImageData(until - from, reading.units);
    for (let t = from; t < until; t++) {
      for (let unit = 0; unit < reading.units; unit++) {
        image.data.set([...diverging(reading.states[t * reading.units + unit]), 255], 4 * (unit * (until - from) + t - from));
      }
    }
    canvas.getContext('2d').putImageData(image, from, 0);
    drawn = until;
  }

  onTheme(() => { if (reading) draw(0); });
  return {
    node: inside,
    show(next) {
      if (next !== reading) drawn = 0;
      reading = next;
      draw(drawn);
    },
    move(step) {
      const share = reading ? step / reading.time : 0;
      veil.style.transform = `scaleX(${1 - share})`;
      cursor.style.left = `${100 * share}%`;
    },
  };
}

/**
 * The player: slider, play, speed, and what it moves.
 *
 * It has `node`, `show(pixels, label, reading)`, where the reading may go on, `refresh()` for when it has, and
 * `seek(steps)`.
 */
function player(view, classes, { hasProbabilities, hasStates, largest, stride }) {
  const image = readingImage(view);
  const bars = hasProbabilities ? probabilityBars(classes) : null;
  const lines = hasProbabilities ? probabilityLines() : null;
  const map = hasStates ? stateMap() : null;
  const told = h('p', { class: 'now' });
  const spoken = h('p', { class: 'hidden', 'aria-live': 'polite' });
  const mind = h('p', { class: 'mind' });
  const asTable = hasProbabilities ? folded('As a table', () => probabilityTable(reading)) : null;
  const slider = h('input', { type: 'range', min: 0, max: view.time, step: 1, 'aria-label': 'Steps read', oninput: () => { pause(); seek(Number(slider.value)); say(); } });
  const play = h('button', { type: 'button', class: 'play', onclick: () => (frame === null ? start() : pause()) }, 'Play');
  const base = view.time / (view.time > 100 ? 10 : 6);
  const speed = h('select', { 'aria-label': 'Speed' }, [0.25, 0.5, 1, 2, 4].map((factor) => {
    const option = h('option', { value: factor }, `${short(Number((base * factor).toPrecision(2)))} steps/s`);
    option.selected = factor === 1;
    return option;
  }));
  let [pixels, label, reading, at, frame, spokenAt, lastLeader] = [null, null, null, 0, null, 0, -1];

  function seek(steps) {
    at = Math.max(0, Math.min(view.time, steps));
    const whole = Math.min(Math.floor(at), reading.done);
    slider.value = whole;
    image.show(pixels, whole);
    lines?.move(whole);
    map?.move(whole);
    const now = bars && whole ? Array.from(reading.probabilities.subarray((whole - 1) * classes, whole * classes)) : null;
    bars?.show(now, label ?? (reading.done === view.time ? leader(reading, view.time) : null));
    const best = now ? leader(reading, whole) : -1;
    const text = `Step ${whole} of ${view.time}` + (now ? `: ${best} with ${percent(now[best], 0)}` : '');
    told.textContent = text;
    slider.setAttribute('aria-valuetext', text);
    // While it plays, what is read aloud is only a change of mind, and not many of them.
    if (frame !== null && best !== lastLeader && performance.now() - spokenAt > 1500) say();
    lastLeader = best;
  }

  function say() {
    spoken.textContent = told.textContent;
    spokenAt = performance.now();
  }

  function start() {
    if (at >= view.time) seek(0);
    play.textContent = 'Pause';
    let before = null;
    const tick = (now) => {
      const passed = before === null ? 0 : Math.min(0.1, (now - before) / 1000);
      before = now;
      seek(at + passed * base * Number(speed.value));
      if (at >= view.time && reading.done === view.time) {
        pause();
        say();
        return;
      }
      frame = requestAnimationFrame(tick);
    };
    frame = requestAnimationFrame(tick);
  }

  function pause() {
    if (frame !== null) cancelAnimationFrame(frame);
    frame = null;
    play.textContent = 'Play';
  }

  function refresh() {
    if (hasProbabilities && reading.done) lines.show(reading, label);
    if (hasStates && reading.done) map.show(reading);
    const isDone = reading.done === view.time;
    if (hasProbabilities && isDone) {
      const step = decidedAt(reading);
      const final = leader(reading, view.time);
      mind.replaceChildren('It makes up its mind at ', h('b', null, `step ${step}`), `: from then on it says ${final}`
        + (label === null ? '.' : final === label ? ', which is right.' : `, but it is ${label}.`));
    } else mind.textContent = '';
    seek(at);
  }

  const seekBy = (element, left) => {
    const move = (event) => {
      const box = element.getBoundingClientRect();
      pause();
      seek(Math.round((event.clientX - box.left - left) / (box.width - left) * view.time));
      say();
    };
    element.addEventListener('pointerdown', (event) => {
      if (event.pointerType === 'touch') { move(event); return; }
      element.setPointerCapture(event.pointerId);
      move(event);
    });
    element.addEventListener('pointermove', (event) => { if (event.buttons & 1) move(event); });
  };
  if (lines) seekBy(lines.plot, AXIS);
  if (map) seekBy(map.node, 0);

  const node = h('div', { class: 'player', onkeydown: (event) => {
    if (event.key === ' ' && !['BUTTON', 'SELECT', 'INPUT'].includes(event.target.tagName)) { event.preventDefault(); play.click(); }
  } },
  h('div', { class: 'controls' }, play, slider, speed),
  h('div', { class: 'stage' },
    h('div', { class: 'left' }, h('div', { class: 'frame' }, image.canvas), told, bars?.node, spoken),
    h('div', { class: 'over-time' },
      lines ? h('div', null, h('h3', null, 'Probabilities'), lines.node) : null,
      map ? h('div', null, h('h3', null, 'Hidden state'), map.node, h('p', { class: 'scale' }, h('span', null, `−${short(largest)}`), h('i', { class: 'gradient' }), h('span', null, short(largest)), h('span', { class: 'muted' }, `a row for each unit, a column for ${stride > 1 ? `${stride} steps` : 'each step'}`))) : null,
      mind, asTable)));
  return {
    node, seek, refresh,
    pause,
    show(nextPixels, nextLabel, nextReading) {
      [pixels, label, reading] = [nextPixels, nextLabel, nextReading];
      lastLeader = -1;
      if (asTable) asTable.open = false;
      refresh();
    },
  };
}

/** The section, and `choose(digit)` to watch one of the digits; null where the report has no model. */
function watchSection(run, digits) {
  const reading = run.reading;
  if (!reading) return null;
  const { view, classes } = reading;
  const canDraw = reading.network && view.height === SIDE && view.width === SIDE;
  if (!canDraw && !digits.length) return null; // there is nothing to read
  const network = reading.network && decodeNetwork(reading.network);
  const recorded = network || !reading.recorded ? null : recordedReadings(reading);
  const screen = player(view, classes, {
    hasProbabilities: Boolean(network || reading.recorded?.probabilities),
    hasStates: Boolean(network || reading.recorded?.states),
    largest: (!network && reading.recorded?.largest) || 1,
    stride: (!network && reading.recorded?.stride) || 1,
  });

  // A reading is made in slices of a few milliseconds, so that the page goes on answering.
  let wanted = null;
  let isReading = false;
  function read(pixels, label) {
    wanted = { pixels, label };
    if (!isReading) next();
  }
  function next() {
    const { pixels, label } = wanted;
    wanted = null;
    isReading = true;
    const now = Object.assign(beginReading(network, makeSequence(view, pixels)), { stride: 1 });
    let isShown = false;
    const slice = () => {
      const until = performance.now() + 8;
      while (now.done < now.time && performance.now() < until) now.advance(8);
      if (!isShown && (now.done === now.time || !wanted)) {
        isShown = true;
        screen.show(pixels, label, now);
      } else screen.refresh();
      if (now.done < now.time) setTimeout(slice);
      else if (wanted) next();
      else isReading = false;
    };
    slice();
  }

  function show(digit) {
    screen.pause();
    if (network) read(digit.pixels, digit.label);
    else screen.show(digit.pixels, digit.label, recorded(digits.indexOf(digit)));
  }

  let chosen = digits[0];
  const radios = digits.map((digit, k) => h('input', {
    type: 'radio', name: 'digit', id: `digit${k}`, class: 'hidden', checked: k === 0,
    onchange: () => { chosen = digit; show(digit); screen.seek(view.time); },
  }));
  const thumbs = (group) => h('div', { class: 'thumbs' }, digits.map((digit, k) => (group(digit) ? [radios[k],
    h('label', { for: `digit${k}`, title: `a ${digit.label}, read as ${digit.predicted}`, class: digit.label === digit.predicted ? '' : 'wrong' },
      drawDigit(h('canvas', { 'aria-hidden': true }), digit.pixels, digit.height, digit.width),
      h('span', { class: 'hidden' }, `number ${digit.index}, a ${digit.label}, read as ${digit.predicted}`))] : [])));
  const gallery = digits.length ? h('fieldset', { class: 'gallery' }, h('legend', null, `Choose a ${run.split} digit`),
    h('div', { class: 'groups' }, h('div', null, h('h3', null, 'The hardest'), thumbs((digit) => digit.hardest)),
      h('div', null, h('h3', null, 'At random'), thumbs((digit) => !digit.hardest)))) : null;

  const pad = canDraw ? drawingPad((pixels) => { if (!drawPanel.hidden) { screen.pause(); read(pixels, null); screen.seek(view.time); } }) : null;
  const drawPanel = h('div', { hidden: true }, pad?.node);
  const modes = [`${run.split[0].toUpperCase()}${run.split.slice(1)} digits`, 'Draw your own'];
  const choose = (mode) => {
    buttons.forEach((button, k) => button.setAttribute('aria-pressed', k === mode));
    if (gallery) gallery.hidden = mode === 1;
    drawPanel.hidden = mode === 0;
    if (mode === 0 && chosen) show(chosen);
  };
  const buttons = modes.map((name, mode) => h('button', { type: 'button', 'aria-pressed': mode === 0, onclick: () => {
    choose(mode);
    if (mode === 1) read(new Uint8ClampedArray(SIDE * SIDE), null);
  } }, name));
  if (pad && digits.length) {
    pad.node.querySelector('.buttons').append(h('button', { type: 'button', onclick: () => pad.load(chosen) }, 'Start from the chosen digit'));
  }

  const unit = view.name === 'pixel' ? `${view.time} pixels, one at a time` : `${view.time} rows, one at a time`;
  const node = section('watch', 'Watch it read',
    h('p', { class: 'lead' }, `The network reads ${unit}${view.order ? ', in a permuted order' : ''}, and what it would say if the image ended there is shown after each. `,
      network ? 'It runs in this page, on the weights of the selected checkpoint.' : 'What is played was recorded when the page was made.'),
    canDraw ? (digits.length ? h('div', { class: 'segmented', role: 'group', 'aria-label': 'What to read' }, buttons) : null)
      : h('p', { class: 'banner notice' }, 'Drawing is off. ', reading.why_not_live ?? 'It is for images of 28 × 28 pixels.',
        reading.recorded && !reading.recorded.probabilities ? ' So its probabilities at the steps are left out.' : ''),
    gallery, drawPanel, screen.node);
  const begin = () => {
    if (chosen) { show(chosen); screen.seek(view.time); }
    else { choose(1); read(new Uint8ClampedArray(SIDE * SIDE), null); }
  };
  return {
    node, begin,
    choose(digit) {
      choose(0);
      chosen = digit;
      radios[digits.indexOf(digit)].checked = true;
      show(digit);
      screen.seek(0);
      node.scrollIntoView();
      node.querySelector('.play').focus({ preventScroll: true });
    },
  };
}
