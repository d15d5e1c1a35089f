// Elements, numbers in words, the colours in force. All text goes in as text nodes, never as markup.

const SVG = 'http://www.w3.org/2000/svg';

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    const isState = name.startsWith('aria-'); // whose false is a value
    if (value === undefined || value === null || (value === false && !isState)) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'value' || name === 'checked') node[name] = value;
    else node.setAttribute(name, value === true && !isState ? '' : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

/** An HTML element; attributes that are functions, as onclick, listen. */
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);

/** An SVG element. */
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

/** The ends of many numbers; more than a call takes as arguments, perhaps. */
const least = (numbers) => numbers.reduce((a, b) => Math.min(a, b), Infinity);
const greatest = (numbers) => numbers.reduce((a, b) => Math.max(a, b), -Infinity);

const percent = (share, digits = 2) => `${(100 * share).toFixed(digits)}\u00a0%`;
const thousands = (number) => number.toLocaleString('en');

/** A number with about three digits; among ticks with as many as tell it from the next, which is `step` away. */
function short(number, step) {
  if (number === 0) return '0';
  const size = Math.abs(number);
  const digits = step > 0 ? Math.max(0, Math.ceil(-Math.log10(step) - 1e-9)) : 0;
  if (size >= 1000) return number.toLocaleString('en', { maximumFractionDigits: digits });
  if (step > 0 && size >= 1e-3) return String(Number(number.toFixed(digits)));
  return size < 1e-3 ? number.toExponential(1) : String(Number(number.toPrecision(3)));
}

/** A table with a caption, the first cell of each row its heading; cells are text or nodes. */
function table(caption, header, rows, { className = '', numeric = true } = {}) {
  return h('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': caption },
    h('table', { class: `${className} ${numeric ? 'numeric' : ''}` },
      h('caption', { class: 'hidden' }, caption),
      h('thead', null, h('tr', null, header.map((name) => h('th', { scope: 'col' }, name)))),
      h('tbody', null, rows.map((row) => h('tr', null,
        row.map((cell, place) => (place ? h('td', null, cell) : h('th', { scope: 'row' }, cell))))))));
}

/** What a chart shows, as a table that is folded away until it is asked for; `make` is called whenever it is. */
function folded(title, make) {
  const summary = h('summary', null, title);
  const details = h('details', { ontoggle: () => details.replaceChildren(summary, ...(details.open ? [make()] : [])) }, summary);
  return details;
}

/** Runs `draw` with the width of a node whenever that changes. */
function onWidth(node, draw) {
  let last = 0;
  new ResizeObserver(() => {
    const width = Math.floor(node.clientWidth);
    if (width > 0 && width !== last) draw(last = width);
  }).observe(node);
}

const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
};

const themeListeners = [];

/** Runs `draw` whenever the colours change; for what canvases show. */
const onTheme = (draw) => themeListeners.push(draw);
const themeChanged = () => themeListeners.forEach((draw) => draw());

const DIVERGING = {
  light: { zero: [247, 247, 245], positive: [178, 72, 0], negative: [0, 84, 150] },
  dark: { zero: [26, 29, 35], positive: [255, 166, 77], negative: [92, 182, 255] },
};

/** The colour [r, g, b] of a number from -1 to 1: blue below zero, orange above, as strong as it is large. */
function diverging(value) {
  const { zero, positive, negative } = DIVERGING[isDark() ? 'dark' : 'light'];
  const end = value < 0 ? negative : positive;
  const share = Math.min(1, Math.abs(value));
  return zero.map((from, k) => Math.round(from + share * (end[k] - from)));
}

/** Draws a digit on a canvas of its own size, white on black, as it stands in the data. */
function drawDigit(canvas, pixels, height, width) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  for (let i = 0; i < height * width; i++) image.data.set([pixels[i], pixels[i], pixels[i], 255], 4 * i);
  canvas.getContext('2d').putImageData(image, 0, 0);
  return canvas;
}
