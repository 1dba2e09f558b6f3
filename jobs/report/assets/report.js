"use strict";
// The page from top to bottom.

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const remembered = () => { try { return localStorage.getItem("actlake-theme"); } catch { return null; } };
  const button = h("button", { type: "button", onclick: () => set(root.dataset.theme === "dark" ? "light" : "dark", true) });
  const set = (name, keep) => {
    root.dataset.theme = name;
    button.textContent = name === "dark" ? "Light theme" : "Dark theme";
    // A page opened from a file may have no storage; it then forgets.
    if (keep) try { localStorage.setItem("actlake-theme", name); } catch { /* as said */ }
    redraw();
  };
  dark.addEventListener("change", () => { if (!remembered()) set(dark.matches ? "dark" : "light", false); });
  set(remembered() ?? (dark.matches ? "dark" : "light"), false);
  return button;
}

function redraw() {
  for (const draw of redraws) draw();
}

function download() {
  return h("button", { type: "button", onclick: () => {
    const url = URL.createObjectURL(new Blob([document.getElementById("data").textContent], { type: "application/json" }));
    h("a", { href: url, download: `${DATA.name}.report.json` }).click();
    URL.revokeObjectURL(url);
  } }, "Data as JSON");
}

/** While a job runs, the file behind the page is written again and again. */
function reloading() {
  if (!DATA.watch_s || DATA.complete) return null;
  let timer = 0;
  const box = h("input", { type: "checkbox", checked: true, onchange: () => start() });
  const start = () => {
    clearTimeout(timer);
    if (box.checked) timer = setTimeout(() => location.reload(), DATA.watch_s * 1000);
  };
  start();
  return h("label", {}, box, ` reload every ${format.short(DATA.watch_s)} s`);
}

function heading() {
  const spec = DATA.spec;
  const missing = d3.sum(DATA.splits, (split) => split.n_missing);
  const list = DATA.splits.filter((split) => split.n_missing).map((split) =>
    `${split.split}: ${format.count(split.n_shards)} of ${format.count(split.n_shards_planned)} shards, ${format.count(split.n_rows)} of ${format.count(split.n_rows_planned)} rows`);
  document.title = `${DATA.name} – actlake report`;
  document.getElementById("head").append(
    h("div", {}, h("h1", {}, DATA.name),
      h("p", { class: "sub" }, `Activations of ${spec.model} (${spec.architecture}), ${streams.length} streams at ${layers.length} layers, ${spec.dtype}.`,
        DATA.url ? ` ${DATA.url}` : "")),
    h("div", { class: "tools" }, reloading(), download(), theme()));
  return missing
    ? h("p", { class: "banner", role: "status" }, h("b", {}, "Incomplete. "), `${list.join("; ")}. All figures are of what is committed.`)
    : h("p", { class: "banner whole" }, h("b", {}, "Complete. "), "Every planned shard is committed.");
}

function tiles() {
  const [main, ...others] = DATA.splits, made = DATA.provenance;
  const stored = d3.sum(DATA.splits, (split) => split.nbytes), raw = d3.sum(DATA.splits, (split) => split.raw_nbytes);
  const work = made.forward_s + made.encode_s + made.write_s;
  const all = [
    ["Rows", format.rows(main.n_rows), main.n_rows < main.n_rows_planned ? `of ${format.rows(main.n_rows_planned)} planned`
      : others.map((split) => `and ${format.rows(split.n_rows)} ${split.split}`).join(" ") || main.split],
    ["Hook points", format.count(DATA.points.length), `${format.count(d3.sum(DATA.points, (point) => point.width))} channels`],
    ["Stored", format.nbytes(stored), `${format.nbytes(raw)} uncompressed`],
    ["Compression", stored ? `${d3.format(".2f")(raw / stored)}×` : "–", codecText()],
    ["Shards", format.count(main.n_shards), main.n_missing ? `${format.count(main.n_missing)} missing` : "none missing"],
    ["Work", work ? format.seconds(work) : "–", work ? `${d3.format(".0%")(made.forward_s / work)} forward pass` : "no times recorded"],
  ];
  return h("dl", { class: "tiles" }, ...all.map(([name, value, more]) => h("div", {}, h("dt", {}, name), h("dd", {}, value, h("small", {}, more)))));
}

function codecText() {
  const codec = DATA.spec.codec;
  return codec.name === "none" ? "none" : `${codec.name} ${codec.cname} ${codec.clevel}, ${codec.shuffle}`;
}

function numbers() {
  const columns = [
    ["hook point", (p) => p.name], ["width", (p) => format.count(p.width)], ["stored", (p) => format.nbytes(p.nbytes)],
    ["ratio", (p) => (p.ratio ? `${d3.format(".2f")(p.ratio)}×` : "–")], ["mean norm", (p) => format.short(p.norm_mean)],
    ["median", (p) => format.short(p.quantiles?.[3])], ["99 %", (p) => format.short(p.quantiles?.[6])],
    ["largest", (p) => format.short(p.outlier_rows[0]?.[1])], ["unit scale", (p) => format.short(p.unit_scale)],
    ["mean / spread", (p) => (p.mean_to_spread == null ? "–" : d3.format(".2f")(p.mean_to_spread))],
    ["top channels (share)", (p) => p.channels.slice(0, 3).map(([channel, , , share]) => `${channel} (${format.percent(share)})`).join(", ") || "–"],
  ];
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Numbers of every hook point" }, h("table", {},
    h("caption", {}, `Percentiles are of ${ofNorms}. Unit scale makes the mean squared norm 1.`),
    h("thead", {}, h("tr", {}, ...columns.map(([name]) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, ...DATA.points.map((point) => h("tr", {}, ...columns.map(([, value], i) =>
      i ? h("td", {}, value(point)) : h("th", { scope: "row" }, value(point))))))));
}

function specFacts() {
  const { hook_points: hooks, codec, keep, ...plain } = DATA.spec;
  const rows = [...Object.entries(plain), ["keep.exclude", keep.exclude.join(", ") || "none"], ["keep.skip_first", keep.skip_first],
    ["codec", Object.entries(codec).map(([name, value]) => `${name}=${value}`).join(" ")], ["hook points", hooks.length], ...Object.entries(DATA.ids)];
  return facts("Spec", rows);
}

function provenanceFacts() {
  const made = DATA.provenance;
  const rebuilt = d3.sum(DATA.spans, (span) => span.n_rebuilt), voids = d3.sum(DATA.splits, (split) => split.n_void);
  return facts("Provenance", [
    ["first shard begun", format.time(made.first)], ["last shard finished", format.time(made.last)],
    ["hosts", made.hosts.join(", ") || "unknown"], ["devices", made.devices.join(", ") || "unknown"],
    ...made.software.filter(Boolean).map((text) => ["software", text]),
    ["tokens run, with padding", format.count(made.n_tokens)], ["forward pass", format.seconds(made.forward_s)],
    ["encoding", format.seconds(made.encode_s)], ["writing", format.seconds(made.write_s)],
    ["shards built again", format.count(rebuilt)], ["void rows", format.count(voids)],
    ...(made.n_undated ? [["shards without times", format.count(made.n_undated)]] : []),
    ["missing shards", DATA.splits.map((split) => split.n_missing ? `${split.split} ${split.first_missing.join(", ")}${split.n_missing > split.first_missing.length ? ", …" : ""}` : "").filter(Boolean).join("; ") || "none"],
  ]);
}

function section(id, title, ...children) {
  document.getElementById("main").append(h("section", { id, "aria-labelledby": `${id}-title` }, h("h2", { id: `${id}-title` }, title), ...children));
  return h("li", {}, h("a", { href: `#${id}` }, title));
}

const pair = (...children) => h("div", { class: "pair" }, ...children);

function tokensAndLabels() {
  const [tokens, ...others] = mixFigures();
  return pair(tokens, h("div", {}, ...others));
}

document.getElementById("main").append(heading(), tiles());
document.getElementById("contents").append(h("ul", {},
  section("coverage", "Coverage", splits(), coverage()),
  section("norms", "Norms", legend(), pair(normByLayer(), meanToSpread()), pair(normSpread(), normHistogram()), positionProfile()),
  section("channels", "Outlier channels", outlierChannels()),
  section("bytes", "Bytes and time", legend(), compression(), pair(throughput(), progress())),
  section("rows", "Tokens and labels", tokensAndLabels()),
  section("documents", "Documents", h("p", { class: "note" },
    "The first sequences of the first shuffle block; their order in the corpus is random. Grey tokens are not rows."), documentBrowser()),
  section("numbers", "All numbers", numbers()),
  section("spec", "Spec and provenance", pair(specFacts(), provenanceFacts()))));
document.getElementById("foot").append(
  `Written by actlake ${DATA.version}, ${format.time(DATA.generated)}. Dataset ${DATA.ids.dataset_id.slice(0, 12)}. Plots: Observable Plot and D3 (ISC).`);

redraw();
let last = innerWidth, waiting = 0;
addEventListener("resize", () => {
  if (innerWidth === last) return;
  last = innerWidth;
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(redraw);
});
