"use strict";
// The figures. Each returns what `figure` of dom.js makes; plots are of one class, whose style the page's policy allows.

const TIP = { lineHeight: 1.3 };

function plot(width, options) {
  const svg = Plot.plot({ className: "chart", width, marginLeft: 52, marginRight: 16, marginBottom: 38, ...options });
  svg.setAttribute("role", "img");
  // Plot names groups of marks by aria-label, which assistive software allows on elements with a role alone.
  for (const group of svg.querySelectorAll("g[aria-label]")) {
    group.dataset.mark = group.getAttribute("aria-label");
    group.removeAttribute("aria-label");
  }
  return svg;
}

const layerAxis = { label: "layer", domain: layers.length > 1 ? [layers[0], layers.at(-1)] : [layers[0] - 1, layers[0] + 1],
  tickFormat: (x) => (Number.isInteger(x) && x >= 0 ? String(x) : ""), inset: 8 };

/** A logarithmic scale with ticks at 1, 2 and 5 of each decade, or at whole decades where those would crowd; a linear one
 * for values within a factor of four. */
function logScale(values, options = {}) {
  const [low, high] = d3.extent(values.filter((value) => value > 0));
  if (!(high > 4 * low)) return { type: "linear", nice: true, ...options };
  const decades = d3.range(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)) + 1);
  const steps = decades.length > 4 ? [1] : [1, 2, 5];
  const ticks = decades.flatMap((decade) => steps.map((step) => step * 10 ** decade)).filter((tick) => tick >= low / 1.6 && tick <= high * 1.6);
  return { type: "log", domain: [Math.min(low, d3.min(ticks) ?? low) / 1.05, Math.max(high, d3.max(ticks) ?? high) * 1.05], ticks, tickFormat: format.axis, ...options };
}

/** Lines over layers, one for each stream. */
function byLayer(width, value, { y, tip, extra = [] }) {
  const shown = DATA.points.filter((point) => value(point) != null);
  if (!shown.length) return null;
  const marks = { x: "layer", y: value, z: "stream", stroke: (point) => streamColour(point.stream) };
  return plot(width, {
    height: Math.max(240, Math.min(340, width * 0.62)), x: { ...layerAxis, ticks: Math.min(layers.length, width / 50) },
    y: { grid: true, nice: y.type !== "log", ...y }, symbol: { type: "identity" },
    marks: [
      Plot.lineY(shown, { ...marks, strokeWidth: 1.5 }),
      ...extra,
      Plot.dot(shown, { ...marks, symbol: (point) => streamSymbol(point.stream), r: 3.5, strokeWidth: 1.6 }),
      Plot.tip(shown, Plot.pointer({ x: "layer", y: value, title: tip, ...TIP })),
    ],
  });
}

// --- coverage -------------------------------------------------------------------------------------------------------

const shareColour = (share) => colour(share === 1 ? "good" : share === 0 ? "bad" : "partial");
const shareText = (share) => (share === 1 ? "committed" : share === 0 ? "missing" : `${d3.format(".1%")(share)} committed`);
const runText = (run) => `shards ${format.count(run.start)} to ${format.count(run.stop - 1)}: ${shareText(run.share)}`;

function coverage() {
  const split = DATA.splits[0];
  const grid = (stream) => {
    const stored = new Set(pointsOf(stream).map((point) => point.layer));
    const absent = layers.filter((layer) => !stored.has(layer));
    const cells = layers.filter((layer) => stored.has(layer)).flatMap((layer) => split.runs.map((run) => ({ layer, ...run })));
    return (width) => plot(width, {
      height: 46 + layers.length * (layers.length > 40 ? 7 : 11), marginLeft: 34, marginBottom: 32, marginRight: 4, marginTop: 4,
      x: { domain: [0, split.n_shards_planned], label: "shard", ticks: 4, tickFormat: (x) => (Number.isInteger(x) ? format.si(x) : "") },
      y: { type: "band", domain: [...layers].reverse(), label: null, padding: layers.length > 40 ? 0.12 : 0.2,
        tickFormat: (layer) => (layers.length <= 10 || (layer - layers[0]) % 4 === 0 ? layer : "") , tickSize: 0 },
      ariaLabel: `Coverage of ${stream}: layers ${[...stored].join(", ")} stored; ${split.n_shards} of ${split.n_shards_planned} shards committed`,
      marks: [
        Plot.barX(absent, { x1: 0, x2: split.n_shards_planned, y: (layer) => layer, fill: colour("absent") }),
        Plot.barX(cells, { x1: "start", x2: "stop", y: "layer", fill: (cell) => shareColour(cell.share),
          title: (cell) => `layers.${cell.layer}.${stream}\n${runText(cell)}`, tip: TIP }),
      ],
    });
  };
  const multiples = streams.map((stream) => ({ stream, box: h("div", { class: "plot" }), draw: grid(stream) }));
  const boxes = h("div", { class: "multiples" }, ...multiples.map((one) => h("div", {}, h("h3", {}, one.stream), one.box)));
  const key = (name, text) => h("li", {}, swatch(name), text);
  const element = figure({
    title: "Coverage",
    caption: `Layers of each stream (vertical) by shards of the ${split.split} split (horizontal)` +
      (split.shards_per_bin > 1 ? `, ${format.count(split.shards_per_bin)} shards a column` : "") +
      ". A shard is committed for all hook points at once.",
    draw: () => {
      // The small multiples have a width only once they are in the page.
      requestAnimationFrame(() => {
        for (const one of multiples) {
          one.box.replaceChildren(one.draw(Math.floor(one.box.getBoundingClientRect().width)));
        }
      });
      return boxes;
    },
  });
  element.prepend(h("ul", { class: "legend", "aria-label": "Colours" }, key("good", "committed"), key("partial", "in part"),
    key("bad", "missing"), DATA.points.length < streams.length * layers.length ? key("absent", "not in this dataset") : null));
  return element;
}

function swatch(name) {
  const svg = d3.create("svg").attr("width", 14).attr("height", 14).attr("aria-hidden", "true");
  svg.append("rect").attr("width", 14).attr("height", 14).attr("rx", 2).style("fill", `var(--${name})`);
  return svg.node();
}

function splits() {
  return figure({
    title: "Splits",
    caption: "Shards of each split in row order. The held-out split has documents of its own.",
    label: DATA.splits.map((split) => `${split.split}: ${split.n_shards} of ${split.n_shards_planned} shards committed`).join("; "),
    draw: (width) => {
      const cells = DATA.splits.flatMap((split) => split.runs.map((run) => ({ ...run, split: split.split, n: split.n_shards_planned })));
      return plot(width, {
        height: 20 + 30 * DATA.splits.length, marginLeft: 62, marginBottom: 8, marginTop: 4,
        x: { axis: null, domain: [0, 1] }, y: { label: null, domain: DATA.splits.map((split) => split.split), tickSize: 0, padding: 0.25 },
        marks: [Plot.barX(cells, { x1: (c) => c.start / c.n, x2: (c) => c.stop / c.n, y: "split", fill: (c) => shareColour(c.share),
          title: (c) => `${c.split}, ${runText(c)}`, tip: TIP })],
      });
    },
  });
}

// --- norms ----------------------------------------------------------------------------------------------------------

function normByLayer() {
  return figure({
    title: "Norm of the rows",
    caption: `Mean Euclidean norm of a row at each hook point, over ${ofRows}.`,
    label: "Line chart of the mean norm over layers, one line for each stream; the table of hook points has the numbers",
    draw: (width) => byLayer(width, (point) => point.norm_mean || null, {
      y: logScale(DATA.points.map((point) => point.norm_mean), { label: "↑ mean norm" }),
      tip: (point) => `${point.name}\nmean norm ${format.short(point.norm_mean)}` +
        (point.quantiles ? `\nmedian ${format.short(point.quantiles[3])}` : ""),
    }),
  });
}

function meanToSpread() {
  return figure({
    title: "Mean against spread",
    caption: "Norm of the mean row over the root of the summed channel variances. Above 1, more of a row is shared by all " +
      "tokens than tells them apart: centre before training.",
    label: "Line chart of the mean-to-spread ratio over layers, one line for each stream",
    draw: (width) => byLayer(width, (point) => point.mean_to_spread, {
      y: { label: "↑ mean / spread", zero: true },
      tip: (point) => `${point.name}\nmean / spread ${format.short(point.mean_to_spread)}`,
    }),
  });
}

function compression() {
  return figure({
    title: "Compression",
    caption: "Uncompressed bytes over stored bytes, lossless.",
    label: "Line chart of the compression ratio over layers, one line for each stream",
    draw: (width) => byLayer(width, (point) => point.ratio, {
      y: { label: "↑ ratio", ticks: 5 },
      tip: (point) => `${point.name}\n${d3.format(".3f")(point.ratio)}×, ${format.nbytes(point.nbytes)} stored`,
    }),
  });
}

/** Which rows the stored statistics are of. */
const ofRows = DATA.n_stat_shards < DATA.splits[0].n_shards ? `the rows of ${format.count(DATA.n_stat_shards)} of the shards` : "all committed rows";
/** Which rows histograms and percentiles are of: an earlier actlake stored none. */
const ofNorms = DATA.points.every((point) => point.exact_norms) ? ofRows : `${format.count(DATA.mix.n_rows)} sampled rows`;

/** The stream with the most layers, the last of them in the order of computation. */
const mainStream = () => d3.greatest(streams, (a, b) => d3.ascending(pointsOf(a).length, pointsOf(b).length) || d3.ascending(streams.indexOf(a), streams.indexOf(b)));

function normSpread() {
  let stream = mainStream();
  const element = figure({
    title: "Spread of the norm",
    caption: `Of ${ofNorms}: line from the 1st to the 99th percentile, box from the 25th to the 75th, bar at the median.`,
    label: "Percentiles of the norm by layer for the chosen stream",
    controls: [choice("stream", streams, stream, (chosen) => { stream = chosen; element.redraw(); })],
    draw: (width) => {
      const shown = pointsOf(stream).filter((point) => point.quantiles && point.quantiles[0] > 0);
      if (!shown.length) return null;
      const stroke = streamColour(stream);
      return plot(width, {
        height: Math.max(240, Math.min(340, width * 0.62)), x: { ...layerAxis, ticks: Math.min(layers.length, width / 50) },
        y: logScale(shown.flatMap((p) => [p.quantiles[0], p.quantiles[6]]), { label: "↑ norm", grid: true }),
        marks: [
          Plot.ruleX(shown, { x: "layer", y1: (p) => p.quantiles[0], y2: (p) => p.quantiles[6], stroke, strokeWidth: 1 }),
          Plot.rect(shown, { x1: (p) => p.layer - 0.3, x2: (p) => p.layer + 0.3, y1: (p) => p.quantiles[2], y2: (p) => p.quantiles[4], fill: stroke, fillOpacity: 0.4 }),
          Plot.ruleY(shown, { x1: (p) => p.layer - 0.3, x2: (p) => p.layer + 0.3, y: (p) => p.quantiles[3], stroke, strokeWidth: 2.5 }),
          Plot.tip(shown, Plot.pointerX({ x: "layer", y: (p) => p.quantiles[3], ...TIP, title: (p) =>
            `${p.name}\n` + ["1 %", "5 %", "25 %", "median", "75 %", "95 %", "99 %"].map((q, i) => `${q}  ${format.short(p.quantiles[i])}`).reverse().join("\n") })),
        ],
      });
    },
  });
  return element;
}

function normHistogram() {
  const names = DATA.points.filter((point) => point.histogram).map((point) => point.name);
  const preferred = pointsOf(mainStream()).map((point) => point.name).filter((one) => names.includes(one));
  let name = preferred[preferred.length >> 1] ?? names[0];
  const element = figure({
    title: "Distribution of the norm",
    caption: `Rows by norm at one hook point, of ${ofNorms}; eight bins an octave. Dashed: the mean.`,
    label: "Histogram of the norm at the chosen hook point",
    controls: names.length ? [choice("hook point", names, name, (chosen) => { name = chosen; element.redraw(); })] : [],
    draw: (width) => {
      const point = DATA.points.find((one) => one.name === name);
      if (!point) return null;
      const { edges, counts } = point.histogram;
      const total = d3.sum(counts);
      const bars = counts.map((count, i) => ({ x1: edges[i], x2: edges[i + 1], share: count / total, count })).filter((bar) => bar.count && bar.x1 > 0);
      return plot(width, {
        height: Math.max(240, Math.min(340, width * 0.62)),
        x: logScale(bars.flatMap((bar) => [bar.x1, bar.x2]), { label: "norm →" }),
        y: { label: "↑ share of rows", grid: true, tickFormat: "~%" },
        marks: [
          Plot.rectY(bars, { x1: "x1", x2: "x2", y: "share", fill: streamColour(point.stream), insetLeft: 0.5, insetRight: 0.5,
            title: (bar) => `norm ${format.short(bar.x1)} to ${format.short(bar.x2)}\n${format.count(bar.count)} rows, ${format.percent(bar.share)}`, tip: TIP }),
          Plot.ruleX([point.norm_mean], { stroke: colour("ink"), strokeDasharray: "4 3" }),
          Plot.ruleY([0]),
        ],
      });
    },
  });
  return element;
}

function positionProfile() {
  const { edges, n_rows: nRows, ratios } = DATA.positions;
  const available = streams.filter((stream) => pointsOf(stream).some((point) => ratios[point.name]));
  let stream = available.includes(mainStream()) ? mainStream() : available[0];
  const element = figure({
    title: "Norm by position",
    caption: `Mean norm of the rows at a position over that of all rows, of ${format.count(DATA.mix.n_rows)} sampled rows; one line a layer. ` +
      "Position 0 is BOS where there is one.",
    label: "Line chart of the relative norm over the position, one line for each layer of the chosen stream",
    controls: available.length ? [choice("stream", available, stream, (chosen) => { stream = chosen; element.redraw(); }), layerRamp()] : [],
    draw: (width) => {
      const shown = pointsOf(stream).filter((point) => ratios[point.name]).flatMap((point) => ratios[point.name].map((ratio, i) => ({
        ...point, ratio, place: (edges[i] + edges[i + 1] - 1) / 2 + 1, from: edges[i], to: edges[i + 1] - 1, n: nRows[i] }))).filter((row) => row.n);
      if (!shown.length) return null;
      return plot(width, {
        height: Math.max(240, Math.min(380, width * 0.5)),
        x: { type: "log", base: 2, label: "position + 1 →", tickFormat: format.count, ticks: d3.range(0, 24, width < 500 ? 2 : 1).map((i) => 2 ** i).filter((x) => x <= d3.max(shown, (row) => row.place)) },
        y: { label: "↑ norm / mean norm", grid: true, nice: true },
        marks: [
          Plot.ruleY([1], { stroke: colour("muted"), strokeDasharray: "2 3" }),
          Plot.lineY(shown, { x: "place", y: "ratio", z: "layer", stroke: (row) => layerColour(row.layer), strokeWidth: 1.4 }),
          Plot.dot(shown, { x: "place", y: "ratio", fill: (row) => layerColour(row.layer), r: 2 }),
          Plot.tip(shown, Plot.pointer({ x: "place", y: "ratio", ...TIP, title: (row) =>
            `${row.name}\npositions ${row.from} to ${row.to}\n${format.short(row.ratio)} of the mean norm\n${format.count(row.n)} rows` })),
        ],
      });
    },
  });
  return element;
}

function layerColour(layer) {
  const place = (layer - layers[0]) / Math.max(1, layers.at(-1) - layers[0]);
  const dark = document.documentElement.dataset.theme === "dark";
  return d3.interpolateViridis(dark ? 0.3 + 0.7 * place : 0.85 * (1 - place));
}

function layerRamp() {
  const bar = h("span", { class: "ramp" });
  const paint = () => bar.replaceChildren(...d3.range(24).map((i) => {
    const cell = document.createElement("i");
    cell.style.background = layerColour(layers[0] + (i / 23) * (layers.at(-1) - layers[0]));
    return cell;
  }));
  redraws.push(paint);
  return h("span", { class: "scale" }, `layer ${layers[0]}`, bar, String(layers.at(-1)));
}

// --- channels -------------------------------------------------------------------------------------------------------

function outlierChannels() {
  let stream = mainStream();
  const element = figure({
    title: "Channels that stand out",
    caption: "Share of the mean squared norm that lies in one channel; the colour grows with the root of the share. Shown are the " +
      "three strongest channels of any layer.",
    label: "Map of channels by layers for the chosen stream, coloured by the channel's share of the squared norm",
    controls: [choice("stream", streams, stream, (chosen) => { stream = chosen; element.redraw(); }), heatRamp()],
    draw: (width) => {
      const map = DATA.channel_maps[stream];
      if (!map?.channels.length) return null;
      const cells = map.layers.flatMap((layer, i) => map.channels.map((channel, j) => ({ layer, channel, share: map.shares[i][j] })));
      return plot(width, {
        height: 54 + 18 * map.channels.length, marginLeft: 62, marginTop: 24,
        x: { type: "band", domain: layers, label: "layer", padding: 0.06, tickFormat: (x, i) => (layers.length * 22 < width || i % 4 === 0 ? x : "") },
        y: { type: "band", label: "channel", padding: 0.06, domain: map.channels, tickFormat: String, tickSize: 0 },
        marks: [
          Plot.cell(cells, { x: "layer", y: "channel", fill: (cell) => heat(Math.sqrt(cell.share)),
            title: (cell) => `layers.${cell.layer}.${stream}\nchannel ${cell.channel}: ${format.percent(cell.share)}`, tip: TIP }),
        ],
      });
    },
  });
  return element;
}

function heatRamp() {
  const bar = h("span", { class: "ramp" });
  const paint = () => bar.replaceChildren(...d3.range(24).map((i) => {
    const cell = document.createElement("i");
    cell.style.background = heat(i / 23);
    return cell;
  }));
  redraws.push(paint);
  return h("span", { class: "scale" }, "0", bar, "100 %");
}

// --- the run --------------------------------------------------------------------------------------------------------

function timeAxis(width) {
  const [first, last] = [d3.min(DATA.spans, (span) => span.start), d3.max(DATA.spans, (span) => span.stop)];
  const hours = (last - first) / 3.6e6;
  return { type: "utc", label: null, ticks: width / 90, tickFormat: d3.utcFormat(hours < 0.2 ? "%H:%M:%S" : hours < 36 ? "%H:%M" : "%b %d") };
}

function throughput() {
  const incidents = DATA.spans.filter((span) => span.n_rebuilt || span.n_void);
  return figure({
    title: "Throughput in time",
    caption: `Rows a second over UTC, ${DATA.spans.some((span) => span.n_shards > 1) ? "in 400 equal spans of time" : "one block a shard, as wide as it took"}. ` +
      "Empty time is time without a commit; a dot marks shards that were built again or have void rows.",
    label: "Rows a second over the time of the run",
    draw: (width) => {
      if (!DATA.spans.length) return null;
            return plot(width, {
        height: Math.max(220, Math.min(300, width * 0.55)), x: timeAxis(width), y: { label: "↑ rows/s", grid: true, tickFormat: format.si },
        marks: [
          Plot.rectY(DATA.spans, { x1: "start", x2: "stop", y: "rows_per_s", fill: colour("good"), fillOpacity: 0.75, inset: 0.25,
            title: (span) => `${[span.split, span.label].filter(Boolean).join(", ")}${span.host ? ` on ${span.host}` : ""}\n${format.count(span.n_rows)} rows, ` +
              `${format.short(span.rows_per_s)} rows/s\nforward ${format.seconds(span.forward_s)}, encode ${format.seconds(span.encode_s)}, write ${format.seconds(span.write_s)}` +
              (span.n_rebuilt ? `\n${format.count(span.n_rebuilt)} built again` : "") + (span.n_void ? `\n${format.count(span.n_void)} void rows` : ""), tip: TIP }),
          Plot.dot(incidents, { x: (span) => (span.start + span.stop) / 2, y: "rows_per_s", fill: colour("bad"), r: 4 }),
          Plot.ruleY([0]),
        ],
      });
    },
  });
}

function progress() {
  return figure({
    title: "Progress",
    caption: `Committed rows over UTC, of ${format.count(d3.sum(DATA.splits, (split) => split.n_rows_planned))} planned (dashed).`,
    label: "Committed rows over the time of the run",
    draw: (width) => {
      if (!DATA.spans.length) return null;
      let total = 0;
      const steps = [{ t: d3.min(DATA.spans, (span) => span.start), total }];
      for (const span of DATA.spans) steps.push({ t: span.stop, total: (total += span.n_rows) });
      return plot(width, {
        height: Math.max(220, Math.min(300, width * 0.55)), x: timeAxis(width), y: { label: "↑ rows", grid: true, tickFormat: format.si },
        marks: [
          Plot.areaY(steps, { x: "t", y: "total", curve: "step-after", fill: colour("good"), fillOpacity: 0.2 }),
          Plot.lineY(steps, { x: "t", y: "total", curve: "step-after", stroke: colour("good"), strokeWidth: 2 }),
          Plot.ruleY([d3.sum(DATA.splits, (split) => split.n_rows_planned)], { strokeDasharray: "4 3" }),
          Plot.tip(steps, Plot.pointerX({ x: "t", y: "total", ...TIP, title: (step) => `${new Date(step.t).toISOString().slice(0, 19).replace("T", " ")}\n${format.count(step.total)} rows` })),
        ],
      });
    },
  });
}

// --- what the rows are ----------------------------------------------------------------------------------------------

/** A token as people can tell it from others: white space is shown by its marks. */
function tokenText(id) {
  const piece = DATA.pieces[id];
  if (piece === undefined) return `#${id}`;
  return piece.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍") || `#${id}`;
}

function bars({ title, caption, rows, total }) {
  return figure({
    title, caption, label: `${title}: ${rows.slice(0, 5).map(([name, n]) => `${name} ${format.percent(n / total)}`).join(", ")}`,
    draw: (width) => {
      if (!rows.length) return null;
      const left = Math.min(width * 0.42, 24 + 7.2 * d3.max(rows, ([name]) => name.length));
      const fits = Math.max(6, Math.floor((left - 14) / 7));
      const data = rows.map(([name, n], i) => ({ i, name, short: name.length > fits ? `${name.slice(0, fits - 1)}…` : name, n }));
      return plot(width, {
        height: 34 + 18 * rows.length, marginLeft: left, marginRight: 52, marginTop: 4, marginBottom: 28,
        x: { tickFormat: "~%", label: null, grid: true, ticks: Math.max(2, width / 120) },
        y: { type: "band", domain: d3.range(rows.length), tickFormat: (i) => data[i].short, label: null, tickSize: 0 },
        marks: [
          Plot.barX(data, { x: (d) => d.n / total, y: "i", fill: colour("good"), title: (d) => `${d.name}\n${format.count(d.n)} rows, ${format.percent(d.n / total)}`, tip: TIP }),
          Plot.text(data, { x: (d) => d.n / total, y: "i", text: (d) => format.percent(d.n / total), textAnchor: "start", dx: 4, fill: colour("ink") }),
        ],
      });
    },
  });
}

function mixFigures() {
  const { n_rows: total, tokens, roles, labels, n_distinct_tokens: distinct } = DATA.mix;
  const found = [bars({ title: "Tokens", caption: `The most frequent of ${format.count(distinct)} distinct tokens in ${format.count(total)} sampled rows.`,
    rows: tokens.map(([id, n]) => [tokenText(id), n]), total })];
  found.push(bars({ title: "Roles", caption: "What kind of text the rows' tokens are from.", rows: Object.entries(roles), total }));
  for (const [field, rows] of Object.entries(labels)) {
    found.push(bars({ title: field === "source" ? "Sources" : `Label “${field}”`, caption: `Sampled rows by ${field} of their document.`,
      rows: rows.map(([name, n]) => [name || "(none)", n]), total }));
  }
  return found;
}
