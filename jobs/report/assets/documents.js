"use strict";
// Documents token by token, coloured by the norm of each token's row at one hook point.

function documentBrowser() {
  const { points, documents } = DATA.documents;
  if (!documents.length) return h("p", { class: "nothing" }, "No rows were sampled, or none is committed.");
  const state = { document: 0, point: points.length >> 1, token: 0 };
  const text = h("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Tokens; move with the arrow keys" });
  const detail = h("p", { class: "detail", role: "status", "aria-live": "polite" });
  const about = h("p", { class: "note" });
  const low = h("span"), high = h("span");
  const ramp = h("span", { class: "ramp" });

  const shade = (cell, share) => {
    const style = getComputedStyle(document.documentElement);
    const strength = share * Number(style.getPropertyValue("--token-strength"));
    cell.style.backgroundColor = `rgb(${style.getPropertyValue("--token")} / ${strength.toFixed(3)})`;
  };
  const scale = () => {
    const norms = documents.flatMap((one) => one.norms[state.point]).filter((norm) => norm > 0).sort(d3.ascending);
    // The largest and the smallest hundredth would leave all the others one colour.
    const ends = norms.length ? [d3.quantileSorted(norms, 0.01), d3.quantileSorted(norms, 0.99)] : [1, 2];
    return d3.scaleLog().domain(ends[0] < ends[1] ? ends : [ends[0], ends[0] * 2]).range([0, 1]).clamp(true);
  };
  const describe = () => {
    const one = documents[state.document];
    const norm = one.norms[state.point][state.token];
    const role = DATA.roles[one.roles[state.token]] ?? one.roles[state.token];
    detail.textContent = `“${tokenText(one.tokens[state.token])}”, token ${one.tokens[state.token]} at position ${state.token}: ` +
      (one.rows[state.token] < 0 ? "no row: left out by the keep rule, or of another block" : norm == null ? "void row" : `norm ${format.short(norm)} at ${points[state.point]}, row ${format.count(one.rows[state.token])}`) +
      `; role ${role}`;
  };
  const select = (token) => {
    text.children[state.token]?.classList.remove("here");
    state.token = Math.max(0, Math.min(text.children.length - 1, token));
    text.children[state.token].classList.add("here");
    describe();
  };
  const draw = () => {
    const one = documents[state.document], of = scale();
    const spans = one.tokens.map((token, i) => {
      const piece = DATA.pieces[token] ?? (token < 0 ? "·" : `#${token} `);
      const span = h("span", { "data-token": i }, piece.replace(/\n/g, "↵\n"));
      const norm = one.norms[state.point][i];
      if (one.rows[i] < 0) span.className = "outside";
      else if (norm == null) span.className = "void";
      else shade(span, norm > 0 ? of(norm) : 0);
      if (one.roles[i] && norm != null) span.classList.add("role");
      return span;
    });
    text.replaceChildren(...spans);
    text.scrollTop = 0;
    const labels = Object.entries(one.labels).map(([name, value]) => `${name}: ${value ?? "none"}`);
    const roles = [...new Set(one.roles)].map((role) => DATA.roles[role] ?? role);
    about.textContent = [one.document || `sequence ${one.sequence}`, one.source, one.window ? `part ${one.window + 1}` : "",
      `${format.count(one.tokens.length)} tokens`, `roles: ${roles.join(", ")}`, ...labels].filter(Boolean).join(" · ");
    const [from, to] = of.domain();
    low.textContent = `norm ${format.short(from)}`;
    high.textContent = format.short(to);
    ramp.replaceChildren(...d3.range(24).map((i) => { const cell = document.createElement("i"); shade(cell, i / 23); return cell; }));
    select(state.token);
  };
  const open = (number) => {
    state.document = (number + documents.length) % documents.length;
    state.token = 0;
    chooser.value = String(state.document);
    draw();
  };
  const chooser = h("select", { onchange: () => open(Number(chooser.value)), "aria-label": "Document" });
  documents.forEach((one, i) => chooser.append(h("option", { value: i }, `${i + 1}. ${one.document || `sequence ${one.sequence}`}`.slice(0, 60))));
  text.addEventListener("click", (event) => { if (event.target.dataset.token) select(Number(event.target.dataset.token)); });
  text.addEventListener("mouseover", (event) => { if (event.target.dataset.token) select(Number(event.target.dataset.token)); });
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    select(state.token + step);
    text.children[state.token].scrollIntoView({ block: "nearest" });
  });
  redraws.push(draw);
  return h("div", {},
    h("div", { class: "controls" },
      h("button", { type: "button", onclick: () => open(state.document - 1) }, "← Previous"), chooser,
      h("button", { type: "button", onclick: () => open(state.document + 1) }, "Next →"),
      choice("hook point", points, points[state.point], (name) => { state.point = points.indexOf(name); draw(); }),
      h("span", { class: "scale" }, low, ramp, high)),
    DATA.corpus_note ? h("p", { class: "note" }, `Tokens are shown by number: ${DATA.corpus_note}.`) : null,
    about, text, detail);
}
