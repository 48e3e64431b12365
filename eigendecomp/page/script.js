"use strict";
// Everything that is shown comes from the JSON in the page and is put there as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const directions = data.directions.map((direction, number) => ({ ...direction, number, strength: direction[data.by] }));
const measures = ["impact", "activation"];
const explained = {
  impact: `mean |z| over ${data.references} drawn reference${data.references === 1 ? "" : "s"}: how much of what a sample's output does runs along the direction`,
  activation: "√(uᵀHu): how far a sample's output moves for a unit step along the direction",
};
const state = { key: "curvature", down: true, query: "", which: "all", measure: data.by, places: true, chosen: null };
const $ = (id) => document.getElementById(id);

// ---- making elements

function make(space, name, attributes, children) {
  const element = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [event, run] of Object.entries(value)) element.addEventListener(event, run);
    else if (key === "style") for (const [property, set] of Object.entries(value)) element.style.setProperty(property, set);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}
const h = (name, attributes, ...children) => make(null, name, attributes, children);
const s = (name, attributes, ...children) => make("http://www.w3.org/2000/svg", name, attributes, children);

function number(x, digits = 3) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size < 1e-3 || size >= 1e5 ? x.toExponential(digits - 1) : String(Number(x.toPrecision(digits)));
  return text.replace(/-/g, "−");
}
function percent(x) {
  if (x === 0) return "0%";
  return x < 1e-4 ? "<0.01%" : `${x < 0.1 ? Number((100 * x).toPrecision(2)) : (100 * x).toFixed(0)}%`;
}
const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const visible = (token) => token.replace(/\n/g, "¶");
// A name on its own; that a token begins with a space is part of its name.
const called = (name) => [/^\s/.test(name) && h("span", { class: "faint" }, "␣"), visible(name).trim()];
const signed = (x, text = number(x)) => (x > 0 ? `+${text}` : text);

// ---- the list

const bodies = $("list").tBodies[0];
const most = Object.fromEntries(["active", "curvature", "strength"].map((key) => [key, Math.max(...directions.map((d) => d[key]), 1e-12)]));

function named(direction) {
  return direction.about.length ? direction.about.map(visible).join(" · ") : direction.promoted.length ? "" : "no effect";
}
function promotes(direction) {
  return direction.promoted.slice(0, 3).map(([name]) => visible(name).trim() || "␣").join(data.kind === "text" ? "  " : ", ");
}
const chips = (direction) => (data.kind === "text" && direction.about.length ? direction.about.map((token) => h("span", { class: "chip" }, visible(token))) : named(direction));
function cell(direction, key, text) {
  const width = `${Math.max(0, (100 * direction[key]) / most[key])}%`;
  return h("td", { class: "number" }, text, h("span", { class: "meter", style: { width } }));
}
for (const direction of directions) {
  const first = named(direction), second = promotes(direction);
  direction.row = h("tr", { class: direction.alive ? null : "dead", on: { click: () => go(direction.number) } },
    h("td", {}, h("a", { href: `#${direction.number}`, "aria-label": `Direction ${direction.number}` }, String(direction.number))),
    h("td", { class: "what" }, first && h("span", {}, chips(direction)), h("span", { class: first ? "second" : null }, direction.alive ? null : "dead ", second && `→ ${second}`)),
    cell(direction, "active", percent(direction.active)),
    cell(direction, "curvature", percent(direction.curvature)),
    cell(direction, "strength", number(direction.strength, 2)));
}

function texts(direction) {
  if (direction.haystack === undefined) {
    const parts = [`#${direction.number}`, ...direction.about, ...direction.promoted.map(([name]) => name), ...direction.suppressed.map(([name]) => name)];
    for (const sample of direction.samples) {
      if (sample.label) parts.push(sample.label);
      if (data.kind === "text") parts.push(words(sample).join(""));
    }
    direction.haystack = parts.join("\n").toLowerCase();
  }
  return direction.haystack;
}
function listed() {
  const query = state.query.toLowerCase();
  const value = (direction) => (state.key === "about" ? named(direction) || promotes(direction) : direction[state.key]);
  return directions
    .filter((direction) => state.which === "all" || direction.alive === (state.which === "alive"))
    .filter((direction) => !query || texts(direction).includes(query))
    .sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      const order = typeof x === "string" ? x.localeCompare(y) : x - y;
      return (state.down ? -order : order) || a.number - b.number;
    });
}
let shown = [];
function list() {
  shown = listed();
  bodies.replaceChildren(...shown.map((direction) => direction.row));
  $("matches").textContent = shown.length === directions.length ? count(shown.length, "direction") : `${shown.length} of ${count(directions.length, "direction")}`;
  for (const head of document.querySelectorAll("#list th")) {
    if (head.dataset.key === state.key) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
}

// ---- samples

function words(sample) {
  return data.examples[sample.e].slice(sample.from, sample.to).map((id) => data.vocabulary[id]);
}
function hits(tokens) {
  const matched = new Set();
  const query = state.query.toLowerCase();
  if (!query) return matched;
  const text = tokens.join("").toLowerCase();
  for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + 1)) {
    let start = 0;
    tokens.forEach((token, i) => {
      if (start < at + query.length && start + token.length > at) matched.add(i);
      start += token.length;
    });
  }
  return matched;
}
const tipOf = (sample) => `${sample.label ? `${sample.label}\n` : ""}impact ${number(sample.impact, 4)}\nactivation ${number(sample.activation, 4)}\nz ${number(sample.z, 4)} (one reference)\nexample ${sample.e}${data.positions > 1 ? `, position ${sample.p}` : ""}`;

function text(sample, largest) {
  const tokens = words(sample), marked = hits(tokens), shades = sample.shades;
  const spans = tokens.map((token, i) => {
    const here = shades && sample.from + i === sample.p;
    const tip = shades && `${JSON.stringify(token)}\n${measures.map((key) => `${key} ${number(shades[key][i])}`).join("\n")}`;
    const s = shades && largest ? Math.max(0, Math.min(1, shades[state.measure][i] / largest)) : 0;
    return h("span", { class: `token${here ? " here" : ""}${marked.has(i) ? " hit" : ""}`, "data-tip": tip, style: { "--s": (s ** 1.4).toFixed(3) } }, visible(token));
  });
  return h("li", {},
    h("div", { class: "value", "data-tip": tipOf(sample) }, number(sample[state.measure]), h("span", { class: "meter", style: { width: `${largest ? (100 * sample[state.measure]) / largest : 0}%` } })),
    h("div", {}, sample.label && h("span", { class: "label" }, sample.label),
      h("p", { class: "text" }, sample.from > 0 && h("span", { class: "faint" }, "…"), spans, sample.to < data.examples[sample.e].length && h("span", { class: "faint" }, "…"))));
}

function places(map) {
  const canvas = h("canvas", { width: map.width, height: map.height, role: "img", "aria-label": "where its activation arises" });
  const context = canvas.getContext("2d"), pixels = context.createImageData(map.width, map.height);
  const plus = [255, 140, 26], minus = [72, 170, 255]; // on a picture, whatever the page's colours
  Array.from(atob(map.bytes), (one) => (one.charCodeAt(0) << 24) >> 24).forEach((value, i) => {
    const size = Math.abs(value) / 127;
    pixels.data.set([...(value > 0 ? plus : minus), 235 * size ** 0.8], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
  return canvas;
}
function image(sample) {
  const what = sample.label ?? `example ${sample.e}`;
  const tip = tipOf(sample) + (sample.map ? `\nthe places add up to ${number(sample.map.sum, 4)}` : "");
  return h("figure", { "data-tip": tip },
    h("div", { class: "picture", style: { "aspect-ratio": String(data.aspect) } }, h("img", { src: data.examples[sample.e], alt: what }), sample.map && places(sample.map)),
    h("figcaption", {}, what, h("br"), h("span", { class: "soft" }, number(sample[state.measure]))));
}

function vector(sample) {
  const values = data.examples[sample.e][sample.p], width = 160, height = 64, step = width / values.length;
  const zero = values.some((value) => value < 0) ? height / 2 : height;
  const bars = values.map((value, i) => {
    const size = (Math.abs(value) / (data.largest || 1)) * zero;
    return s("rect", { class: value < 0 ? "bar minus" : "bar", x: i * step + step * 0.1, width: step * 0.8, y: value < 0 ? zero : zero - size, height: size, "data-tip": `${data.features[i]}\n${number(value)}` });
  });
  const short = values.length <= 10 && data.features.every((name) => name.length <= 3);
  const below = short && data.features.map((name, i) => s("text", { x: (i + 0.5) * step, y: height + 11, "text-anchor": "middle" }, name));
  return h("figure", {},
    s("svg", { viewBox: `0 0 ${width} ${height + (short ? 14 : 0)}`, role: "img", "aria-label": data.features.map((name, i) => `${name} ${number(values[i], 2)}`).join(", ") }, bars, below, s("line", { class: "axis", x1: 0, x2: width, y1: zero, y2: zero })),
    h("figcaption", { "data-tip": tipOf(sample) }, sample.label && `${sample.label} `, number(sample[state.measure])));
}

function samples(direction) {
  const largest = direction[state.measure];
  const draw = { text: (sample) => text(sample, largest), image, vector }[data.kind];
  const choice = () => h("fieldset", { class: "choice" }, h("legend", { class: "hidden" }, "Numbers shown with samples"),
    measures.map((key) => h("label", { title: explained[key] }, h("input", { type: "radio", name: "measure", value: key, checked: state.measure === key, on: { change: () => { state.measure = key; redraw(); } } }), key)),
    mapped && h("label", {}, h("input", { type: "checkbox", id: "places", checked: state.places, on: { change: (event) => { state.places = event.target.checked; redraw(); } } }), "show where"));
  const group = (name, title, note) => {
    const few = direction.samples.filter((sample) => sample.group === name);
    if (!few.length) return null;
    const holder = data.kind === "text" ? "ol" : "div";
    const kind = { text: "texts", image: state.places ? "images" : "images plain", vector: "vectors" }[data.kind];
    return h("section", { "aria-label": title }, h("div", { class: "titled" }, h("h3", {}, title), name === "top" && choice()), h("p", { class: "note" }, note), h(holder, { class: kind }, few.map(draw)));
  };
  const shaded = data.kind === "text" && direction.samples.some((sample) => sample.shades) ? `; each token is shaded by its ${state.measure}, the sample's own is underlined` : "";
  const mapped = direction.samples.some((sample) => sample.map) ? "; orange is where its activation arises, blue where it is held back" : "";
  return h("div", { id: "samples" },
    group("top", "Top samples", `largest ${data.by} first${shaded}${mapped}`),
    group("middle", "Middling samples", `at about three quarters to a quarter of the largest ${data.by}`));
}
function redraw() {
  const focus = document.activeElement?.value ?? document.activeElement?.id;
  $("samples").replaceWith(samples(state.chosen));
  for (const input of document.querySelectorAll("#samples input")) if ((input.value === focus && input.type === "radio") || input.id === focus) input.focus();
}

// ---- beside the samples

function bars(entries, { link, format = number, title }) {
  const largest = Math.max(...entries.map(([, value]) => Math.abs(value)), 1e-30);
  return h("ul", { class: "bars", "aria-label": title }, entries.map(([name, value]) => h("li", {},
    h("span", { class: "name", title: String(name) }, link ? h("a", { href: `#${name}` }, `${name}  `, h("span", { class: "soft" }, named(directions[name]) || `→ ${promotes(directions[name])}`)) : called(String(name))),
    h("span", { class: "amount" }, format(value)),
    h("span", { class: "track" }, h("span", { class: value < 0 ? "fill minus" : "fill", style: { width: `${(100 * Math.abs(value)) / largest}%` } })))));
}

function outputs(direction) {
  if (!direction.promoted.length && !direction.suppressed.length) return null;
  const unit = data.probabilities ? "change of a logit beside the mean of all" : "change of an output";
  return h("section", { id: "outputs" }, h("h3", {}, "Promotes and suppresses"),
    h("p", { class: "note" }, `${unit} for a unit step, to first order, mean over the top samples`),
    h("div", { class: "two" },
      h("div", {}, h("h4", {}, "up"), bars(direction.promoted, { format: (x) => signed(x), title: "promoted" })),
      h("div", {}, h("h4", {}, "down"), bars(direction.suppressed, { format: (x) => signed(x), title: "suppressed" }))));
}

function push(direction) {
  const { steps, lines } = direction.push;
  if (steps.length < 2) return null;
  const width = 340, height = 150, left = 34, bottom = 18, top = 6;
  const values = lines.flatMap(([, line]) => line);
  const low = data.probabilities ? 0 : Math.min(...values), high = Math.max(...values, low + 1e-12);
  const x = (step) => left + ((step - steps[0]) / (steps.at(-1) - steps[0])) * (width - left - 6);
  const y = (value) => top + (1 - (value - low) / (high - low)) * (height - top - bottom);
  const text = (at, label, anchor) => s("text", { x: x(at), y: height - 3, "text-anchor": anchor }, label);
  return h("section", { id: "push" }, h("h3", {}, "Pushed along it"),
    h("p", { class: "note" }, `mean ${data.probabilities ? "probability" : "output"} over the top samples when the parameters move by δ times the direction`),
    s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Outputs at steps ${number(steps[0])} to ${number(steps.at(-1))}: ${lines.map(([name, line]) => `${name} from ${number(line[0])} to ${number(line.at(-1))}`).join("; ")}` },
      [low, high].map((value) => [s("line", { class: "axis", x1: left, x2: width - 6, y1: y(value), y2: y(value) }), s("text", { x: left - 5, y: y(value) + 3.5, "text-anchor": "end" }, number(value, 2))]),
      s("line", { class: "zero", x1: x(0), x2: x(0), y1: top, y2: height - bottom }),
      text(steps[0], `δ = ${number(steps[0], 2)}`, "start"), steps[0] < 0 && steps.at(-1) > 0 && text(0, "0", "middle"), text(steps.at(-1), number(steps.at(-1), 2), "end"),
      lines.map(([, line], i) => s("polyline", { class: `line c${i}`, points: line.map((value, j) => `${x(steps[j]).toFixed(1)},${y(value).toFixed(1)}`).join(" ") })),
      lines.map(([name, line], i) => line.map((value, j) => s("circle", { class: `c${i}`, r: 2.6, cx: x(steps[j]).toFixed(1), cy: y(value).toFixed(1), "data-tip": `${visible(name)}\nδ ${number(steps[j])}: ${number(value, 4)}` })))),
    h("ul", { class: "legend" }, lines.map(([name], i) => h("li", {}, s("svg", { viewBox: "0 0 14 4", "aria-hidden": "true" }, s("line", { class: `c${i}`, x1: 0, x2: 14, y1: 2, y2: 2, "stroke-width": 3 })), h("span", {}, called(name))))));
}

function histogram(direction, key) {
  const { most, counts } = direction.histograms[key], width = 160, height = 74, floor = height - 14;
  const top = Math.log1p(Math.max(...counts)), step = width / counts.length;
  return h("figure", {}, h("figcaption", { class: "small soft", title: explained[key] }, key),
    s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram of ${key}: ${count(data.samples, "sample")} from 0 to ${number(most)}, ${counts[0]} of them in the lowest of ${counts.length} bins` },
      counts.map((n, i) => [
        s("rect", { class: "bar", x: i * step, width: step * 0.86, y: floor - (Math.log1p(n) / top) * floor, height: (Math.log1p(n) / top) * floor }),
        s("rect", { x: i * step, width: step, y: 0, height: floor, fill: "transparent", "data-tip": `${number((i * most) / counts.length)} to ${number(((i + 1) * most) / counts.length)}\n${count(n, "sample")}` })]),
      s("line", { class: "axis", x1: 0, x2: width, y1: floor, y2: floor }),
      s("text", { x: 0, y: height - 2 }, "0"), s("text", { x: width, y: height - 2, "text-anchor": "end" }, number(most))));
}

function anatomy(direction) {
  const heads = direction.heads, largest = Math.max(...heads.flatMap(([, row]) => row), 1e-12);
  return h("section", { id: "anatomy" }, h("h3", {}, "Where it lies"), h("p", { class: "note" }, `share of its squared norm by parameter tensor${heads.length ? ", and by head" : ""}`),
    bars([...direction.tensors].sort((a, b) => b[1] - a[1]).slice(0, 10), { format: percent, title: "share by tensor" }),
    heads.length ? h("div", { class: "wide" }, h("table", { class: "heads" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, h("span", { class: "hidden" }, "tensor")), Array.from({ length: Math.max(...heads.map(([, row]) => row.length)) }, (_, i) => h("th", { scope: "col" }, String(i))))),
      h("tbody", {}, heads.map(([name, row]) => h("tr", {}, h("th", { scope: "row", title: name }, name.split(".").at(-1)),
        row.map((share, i) => h("td", { "data-tip": `${name}\nhead ${i}: ${percent(share)}`, "aria-label": percent(share), style: { "--s": ((0.9 * share) / largest).toFixed(3) } }))))))) : null);
}

function fact(name, value, title) {
  return h("div", { title }, h("dt", {}, name), h("dd", {}, value));
}
function show(direction) {
  state.chosen?.row.removeAttribute("aria-current");
  state.chosen = direction;
  direction.row.setAttribute("aria-current", "true");
  const at = shown.indexOf(direction), next = (by) => shown[(Math.max(at, 0) + by + shown.length) % shown.length] ?? direction;
  const about = named(direction);
  $("direction").replaceChildren(h("article", { "aria-labelledby": "heading" },
    h("div", { class: "head" },
      h("h2", { id: "heading" }, `Direction ${direction.number}`),
      about && h("span", { class: "about" }, chips(direction)), direction.alive ? null : h("span", { class: "badge" }, "dead"),
      h("span", { class: "turn" },
        h("a", { href: `#${next(-1).number}`, "aria-label": "previous direction", title: "previous (left arrow key)" }, "←"),
        h("a", { href: `#${next(1).number}`, "aria-label": "next direction", title: "next (right arrow key)" }, "→"))),
    h("dl", { class: "facts" },
      fact("of samples active", percent(direction.active), `|z| ≥ ${number(data.threshold)}`),
      fact("of the curvature", percent(direction.curvature), "its share of uᵀHu over all directions and samples"),
      measures.map((key) => fact(`largest ${key}`, number(direction[key]), explained[key]))),
    h("div", { class: "body" }, samples(direction),
      h("div", { class: "side" }, outputs(direction), push(direction),
        h("section", { id: "histograms" }, h("h3", {}, "How strong, how often"), h("p", { class: "note" }, "samples by strength; heights are logarithmic"), h("div", { class: "two" }, measures.map((key) => histogram(direction, key)))),
        anatomy(direction),
        direction.interactions.length ? h("section", { id: "interactions" }, h("h3", {}, "Interacts with"), h("p", { class: "note" }, "cosine between what two directions do to the outputs, over all samples"), bars(direction.interactions, { link: true, format: (x) => signed(x, number(x, 2)), title: "interactions" })) : null))));
  document.title = `${direction.number} · ${data.title}`;
  $("direction").scrollTop = 0;
  if ($("direction").getBoundingClientRect().top < 0) $("direction").scrollIntoView(); // where all scrolls as one, on a phone
  const { row } = direction, box = row.closest(".scroll"), head = $("list").tHead.offsetHeight;
  if (box) box.scrollTop = Math.min(Math.max(box.scrollTop, row.offsetTop + row.offsetHeight - box.clientHeight), row.offsetTop - head);
  $("said").textContent = `Direction ${direction.number}: ${about || promotes(direction)}`;
}

// ---- getting about

function go(number) {
  if (location.hash === `#${number}`) follow();
  else location.hash = `#${number}`;
}
function follow() {
  const wanted = /^#\d+$/.test(location.hash) ? directions[Number(location.hash.slice(1))] : undefined;
  const direction = wanted ?? state.chosen ?? shown[0] ?? directions[0];
  if (direction) show(direction);
}
function turn(by) {
  if (!shown.length) return;
  const at = shown.indexOf(state.chosen);
  go(shown[at < 0 ? 0 : (at + by + shown.length) % shown.length].number);
}
function changed() {
  list();
  show(state.chosen);
}
for (const head of document.querySelectorAll("#list th")) {
  head.firstElementChild.addEventListener("click", () => {
    const { key } = head.dataset;
    state.down = state.key === key ? !state.down : !["number", "about"].includes(key);
    state.key = key;
    changed();
  });
}
$("strength").textContent = data.by === "activation" ? "activ." : data.by;
$("strength").title = `the largest ${data.by} of a sample`;
$("search").addEventListener("input", (event) => { state.query = event.target.value.trim(); changed(); });
$("which").addEventListener("change", (event) => { state.which = event.target.value; changed(); });
$("tools").addEventListener("submit", (event) => event.preventDefault());
$("skip").addEventListener("click", (event) => { event.preventDefault(); $("direction").focus(); });
addEventListener("hashchange", follow);
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  const typing = event.target.closest?.("input, select, textarea");
  if (event.key === "Escape") $("tip").hidden = true;
  if (typing) return;
  if (event.key === "ArrowLeft") turn(-1);
  else if (event.key === "ArrowRight") turn(1);
  else if (event.key === "/") $("search").focus();
  else return;
  event.preventDefault();
});

// ---- exact values, wherever there is one to say

function tip(event) {
  const told = event.target.closest?.("[data-tip]"), box = $("tip");
  box.hidden = !told;
  if (!told) return;
  box.textContent = told.dataset.tip;
  const at = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - at.width - 4))}px`;
  box.style.top = `${event.clientY + 18 + at.height > innerHeight ? event.clientY - at.height - 10 : event.clientY + 18}px`;
}
addEventListener("pointermove", tip, { passive: true });
addEventListener("pointerdown", tip, { passive: true });
document.addEventListener("pointerleave", () => { $("tip").hidden = true; });

const dead = directions.filter((direction) => !direction.alive).length;
$("summary").textContent = [count(directions.length, "direction") + (dead ? ` (${dead} dead)` : ""), count(data.samples, "sample"), data.divergence, `samples ranked by ${data.by}`].join(" · ");
list();
follow();
