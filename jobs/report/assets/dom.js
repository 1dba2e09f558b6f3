"use strict";
// Elements, numbers and the state that all figures share. Text from data becomes text nodes and nothing else.

const DATA = JSON.parse(document.getElementById("data").textContent);

/** Make an element; attributes by name, `on...` as listeners, children as nodes or text. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

const format = {
  count: d3.format(","),
  short: (x) => (x == null ? "–" : x && (Math.abs(x) >= 1e6 || Math.abs(x) < 1e-2) ? d3.format(".2e")(x) : d3.format(",.3r")(x)),
  axis: (x) => (x >= 1000 ? d3.format("~s")(x) : String(Number(x.toPrecision(3)))),
  rows: (x) => (x < 1e6 ? d3.format(",")(x) : d3.format(".4~s")(x).replace("G", "B")),
  si: (x) => d3.format(".3~s")(x).replace("G", "B"),
  percent: d3.format(".1%"),
  nbytes: (x) => {
    const units = ["B", "kB", "MB", "GB", "TB", "PB"];
    const place = Math.min(units.length - 1, x ? Math.max(0, Math.floor(Math.log10(x) / 3)) : 0);
    return `${d3.format(place ? ".3r" : "d")(x / 1000 ** place)} ${units[place]}`;
  },
  seconds: (x) => (x < 120 ? `${format.short(x)} s` : x < 7200 ? `${d3.format(".1f")(x / 60)} min` : `${d3.format(".1f")(x / 3600)} h`),
  time: (text) => (text ? text.slice(0, 19).replace("T", " ") + " UTC" : "unknown"),
};

/** A colour of the theme that is shown now. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

const STREAMS = ["resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"];
const SYMBOLS = ["times", "diamond2", "triangle2", "plus", "asterisk", "square2", "circle"];
const SYMBOL_TYPES = { times: d3.symbolTimes, diamond2: d3.symbolDiamond2, triangle2: d3.symbolTriangle2, plus: d3.symbolPlus,
  asterisk: d3.symbolAsterisk, square2: d3.symbolSquare2, circle: d3.symbolCircle };
const streams = STREAMS.filter((stream) => DATA.points.some((point) => point.stream === stream));
const layers = d3.sort(new Set(DATA.points.map((point) => point.layer)));
const streamColour = (stream) => colour(`s-${stream}`);
const streamSymbol = (stream) => SYMBOLS[STREAMS.indexOf(stream)];
const pointsOf = (stream) => DATA.points.filter((point) => point.stream === stream);

/** From the page's ground to the theme's deep colour, for shares from 0 to 1. */
const heat = (share) => d3.interpolateLab(colour("absent"), colour("heat"))(share);

/** A labelled choice; `change` is called with the chosen value. */
function choice(label, values, chosen, change) {
  const select = h("select", { onchange: () => change(select.value) });
  for (const value of values) select.append(h("option", { value, selected: value === chosen }, value));
  return h("label", {}, label, select);
}

/** A name that may go on in the next line after an underscore. */
const breakable = (name) => name.split(/(?<=_)/).flatMap((part, i) => (i ? [h("wbr"), part] : [part]));

/** A table of names and values; values are text. */
function facts(caption, rows) {
  const body = rows.map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, ...breakable(name)), h("td", {}, String(value ?? "–"))));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h("table", { class: "facts" }, h("caption", {}, caption), h("tbody", {}, ...body)));
}

let figures = 0;
const redraws = [];

/** A figure with a numbered caption. `draw(width)` returns the plot, an element or null, and is called at every change
 * of width or theme; `label` says what is to be seen for those who cannot see it. */
function figure({ title, caption, label, draw, controls = [] }) {
  const plot = h("div", { class: "plot" });
  const number = ++figures;
  const text = h("span", {}, caption);
  const element = h("figure", { id: `figure-${number}`, "data-title": title },
    controls.length ? h("div", { class: "controls" }, ...controls) : null, plot,
    h("figcaption", {}, h("b", {}, `Figure ${number}. ${title}. `), text));
  const redraw = () => {
    const width = Math.floor(plot.getBoundingClientRect().width);
    if (!width) return;
    const drawn = draw(width);
    plot.replaceChildren(drawn ?? h("p", { class: "nothing" }, "Nothing to show yet."));
    for (const svg of plot.querySelectorAll("svg.chart")) {
      if (!svg.hasAttribute("aria-label")) svg.setAttribute("aria-label", label ?? title);
    }
  };
  redraws.push(redraw);
  element.redraw = redraw;
  return element;
}

/** The legend of streams, with the marks that figures use. */
function legend(shown = streams) {
  const items = shown.map((stream) => {
    const svg = d3.create("svg").attr("width", 14).attr("height", 14).attr("viewBox", "-7 -7 14 14").attr("aria-hidden", "true");
    svg.append("path").attr("d", d3.symbol(SYMBOL_TYPES[streamSymbol(stream)], 45)()).attr("fill", "none")
      .attr("stroke-width", 2).style("stroke", `var(--s-${stream})`);
    return h("li", {}, svg.node(), stream);
  });
  return h("ul", { class: "legend", "aria-label": "Streams" }, ...items);
}
