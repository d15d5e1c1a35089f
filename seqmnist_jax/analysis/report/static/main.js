// Puts the page together: first what is seen first, the rest as soon as that is on the screen.

const report = JSON.parse(document.getElementById('report').textContent);
const { run, comparison } = report;
const main = document.getElementById('main');

function themeButton() {
  const names = { '': 'Colours: as the system', light: 'Colours: light', dark: 'Colours: dark' };
  const remembered = () => { try { return localStorage.getItem('theme') ?? ''; } catch { return ''; } };
  const button = h('button', { type: 'button', class: 'small', onclick: () => {
    const order = Object.keys(names);
    apply(order[(order.indexOf(document.documentElement.dataset.theme ?? '') + 1) % order.length]);
  } });
  function apply(theme) {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    try { localStorage.setItem('theme', theme); } catch { /* a page from a file may have no storage */ }
    button.textContent = names[theme];
    themeChanged();
  }
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', themeChanged);
  apply(remembered() in names ? remembered() : '');
  return button;
}

document.getElementById('top').append(
  h('div', null, h('p', { class: 'eyebrow' }, 'seqmnist_jax report'), h('h1', null, report.title)),
  themeButton());

const shortName = (id) => (id[0].toUpperCase() + id.slice(1)).replace('-', ' ');
const shown = [];
function add(node) {
  if (!node) return;
  main.append(node);
  shown.push(node);
}

function addPair(...nodes) {
  const there = nodes.filter((node) => node);
  if (!there.length) return;
  main.append(h('div', { class: 'pair' }, there));
  shown.push(...there);
}

if (comparison) {
  const isTested = (one) => one.test?.accuracy != null;
  const among = isTested(comparison.runs[comparison.best ?? 0]) && !comparison.runs.every(isTested) ? 'those that are tested' : 'these';
  add(comparisonSection(comparison));
  add(h('p', { class: 'divider' }, `From here on: ${run.name}, ${comparison.best === null ? 'the first of these' : comparison.runs.length > 1 ? `the best of ${among} by validation accuracy` : 'the only run'}.`));
}
add(summarySection(run));

requestAnimationFrame(() => setTimeout(() => {
  const digits = decodeDigits(run.digits);
  const watch = watchSection(run, digits);
  add(watch?.node);
  add(soonSection(run));
  add(curvesSection(run));
  add(gradientsSection(run));
  addPair(confusionSection(run), calibrationSection(run));
  add(hardestSection(run, digits, watch && ((digit) => watch.choose(digit))));
  watch?.begin();
  document.getElementById('contents').append(h('ul', null, shown.filter((node) => node.id).map((node) =>
    h('li', null, h('a', { href: `#${node.id}` }, shortName(node.id))))));
  document.getElementById('footer').append(h('p', null, `Made by seqmnist_jax ${report.version}. This page is one file; it loads nothing.`));
  document.documentElement.dataset.ready = 'true';
}));
