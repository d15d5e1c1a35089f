// Several runs side by side.

/** Text of each run's own fields; its name where there are none. */
const runLabel = (comparison, run) => (comparison.fields.length && comparison.fields.length <= 3
  ? run.fields.map((value, k) => `${comparison.fields[k].split('.').pop()} ${value}`).join(', ') : run.name);

function comparisonSection(comparison) {
  const { runs, fields } = comparison;
  const best = runs[comparison.best]; // undefined where nothing was validated
  const overlaid = (metric) => runs.map((run, k) => ({ run, curve: run.curves[metric], k })).filter((one) => one.curve)
    .map(({ run, curve, k }) => ({
      name: runLabel(comparison, run), x: curve.steps, y: curve.values,
      color: runs.length > 8 ? 0 : k + 1, dash: runs.length <= 8 && k >= 4 ? '6 3' : undefined,
    }));
  const charts = ['accuracy', 'loss'].map((metric) => {
    const series = overlaid(metric);
    return series.length ? h('figure', null, h('figcaption', null, `${METRICS[metric].title}, on validation images where there are any; the axis spans what is drawn, not from zero`),
      lineChart({ label: `${METRICS[metric].title} of each run`, series, xLabel: 'step', yFormat: METRICS[metric].format, axisFormat: METRICS[metric].axisFormat, height: 300 })) : null;
  });
  const accuracy = (value) => (value === null || value === undefined ? '-' : percent(value));
  const order = runs.map((_, k) => k).sort((a, b) => (runs[b].validation_accuracy ?? -1) - (runs[a].validation_accuracy ?? -1));
  const pValue = (run) => {
    if (run === best) return 'best by validation';
    if (!run.mcnemar) return '-';
    const { p_value: p, accuracy_difference: difference } = run.mcnemar;
    return `${difference > 0 ? '−' : '+'}${percent(Math.abs(difference))}, p ${p < 1e-6 ? '< 1e-6' : `= ${p.toPrecision(2)}`}`;
  };
  const rows = order.map((k) => {
    const run = runs[k];
    return [run.name, ...run.fields, `${thousands(run.steps)}${run.state === 'finished' ? '' : ` (${run.state})`}`, accuracy(run.validation_accuracy),
      run.test?.accuracy === undefined ? '-' : [h('span', null, accuracy(run.test?.accuracy)),
        run.test?.interval ? h('small', null, ` (${run.test.interval.map((x) => (100 * x).toFixed(2)).join(' to ')})`) : ''],
      pValue(run), run.train_seconds === null ? '-' : `${run.train_seconds.toFixed(1)} s`];
  });
  const text = (entry, ...names) => names.map((name) => String(entry[name] ?? '-'));
  return section('comparison', 'Side by side',
    h('div', { class: 'grid' }, charts),
    h('h3', null, 'Runs, by validation accuracy'),
    table('Runs', ['run', ...fields, 'steps', 'validation', 'test (95 % Wilson interval over images)', 'test, against the best by validation', 'training'], rows),
    h('p', { class: 'note' }, 'Against the best by validation: how much more of the same test images are read right, with the p of McNemar’s exact test. It compares two trained models; '
      + 'whether their recipes differ takes several seeds of each, and of many comparisons some fall below 0.05 by chance.'),
    comparison.rankings.map(({ sweep, entries }) => [h('h3', null, `The ranking of the sweep ${sweep}, by validation`),
      table('Ranking', ['recipe', 'runs', 'validation, %', 'test, % (95 % t intervals over seeds)'], entries.map((entry) => text(entry, 'recipe', 'runs', 'validation', 'test')))]),
    comparison.recipes.length ? [h('h3', null, 'Recipes over their seeds'),
      table('Recipes', ['model', 'seeds', 'validation, %', 'test, % (95 % t interval over seeds)', 'command'], comparison.recipes.map((one) => [one.model, one.seeds.join(', '), one.validation, [one.test, ...one.warnings.map((text) => h('small', null, ` ${text}`))], one.command ? h('code', null, one.command) : '-']))] : null);
}
