"use strict";
// Draws the recordings in #data. Text of models, data and plugins reaches the page through text nodes only.

const recordings = JSON.parse(document.getElementById("data").textContent);
const state = { round: recordings[0], layer: null };

// --- small things ----------------------------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const vector = ["svg", "rect", "line", "polyline", "path", "circle", "text"].includes(tag);
  const node = vector ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") for (const [key, part] of Object.entries(value)) node.style.setProperty(key, part);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const BIDI = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;

/** Control characters as their pictures, so that a text cannot hide anything or turn a line around. */
function visible(text) {
  return text
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u009f]/g, (c) => "\\x" + c.charCodeAt(0).toString(16))
    .replace(BIDI, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
}

const number = (value) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(3))).replace("-", "−"));
const SILENT = 1e-8; // TRL's own bound for an advantage that is none; rounding errors are smaller
const signed = (value) => (value && Math.abs(value) <= SILENT ? "~0" : (value > 0 ? "+" : "") + number(value));
const value = (v) => (typeof v === "number" ? number(v) : visible(typeof v === "string" ? v : JSON.stringify(v)));
const finite = (values) => values.filter((v) => v !== null && v !== undefined);
const sum = (values) => values.reduce((a, b) => a + b, 0);
const range = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
const distinct = (values) => [...new Set(values)];

function arrows(values) {
  const kept = values.filter((v, i) => i === 0 || v !== values[i - 1]);
  return kept.flatMap((v, i) => (i ? [make("span", { class: "arrow" }, "→"), v] : [v]));
}

// --- what a recording says -------------------------------------------------------------------------------------------

/** Per token; null where the loss does not count it. */
function tokenAdvantages(row, stage) {
  const found = row.advantages[stage];
  return row.mask.map((use, i) => (use ? (Array.isArray(found) ? found[i] : found) : null));
}

function rowAdvantage(row, stage) {
  const found = row.advantages[stage];
  if (!Array.isArray(found)) return found;
  const counted = finite(tokenAdvantages(row, stage));
  return counted.length ? sum(counted) / counted.length : 0;
}

/** What tokens can be coloured by: advantages after each stage, what each plugin changed, and other values per token. */
function layersOf(recording) {
  const stages = recording.advantage_stages;
  const layers = stages.map((by, i) => ({
    name: i ? `advantage after ${by}` : `advantage of ${by}`, set: "advantage", short: i ? `after ${by}` : by, plusMinus: true,
    of: (row) => tokenAdvantages(row, i),
  }));
  stages.slice(1).forEach((by, i) => layers.push({
    name: `change by ${by}`, set: "change by", short: by, plusMinus: true,
    of: (row) => {
      const before = tokenAdvantages(row, i);
      return tokenAdvantages(row, i + 1).map((v, t) => (v === null ? null : v - before[t]));
    },
  }));
  for (const name of distinct(recording.rows.flatMap((row) => Object.keys(row.values))))
    layers.push({ name, set: "other values", short: name, plusMinus: false, of: (row) => row.values[name] ?? row.mask.map(() => null) });
  for (const layer of layers) {
    const [low, high] = range(recording.rows.flatMap((row) => finite(layer.of(row))));
    layer.low = Number.isFinite(low) ? low : 0;
    layer.high = Number.isFinite(high) ? high : 0;
    layer.scale = Math.max(Math.abs(layer.low), Math.abs(layer.high)) || 1;
  }
  return layers;
}

/** Class and strength of a value in a layer. */
function shade(layer, v) {
  if (v === null || v === undefined) return ["uncounted", 0];
  // the root makes small advantages visible beside large ones; the legend has the same colours
  if (layer.plusMinus) return [v > 0 ? "plus" : v < 0 ? "minus" : "none", Math.sqrt(Math.abs(v) / layer.scale)];
  return ["other", layer.high > layer.low ? (v - layer.low) / (layer.high - layer.low) : 0.5];
}

function shaded(layer, v, attributes, ...children) {
  const [kind, strength] = shade(layer, v);
  const node = make(attributes.tag ?? "span", { class: `${attributes.class ?? ""} ${kind}` }, ...children);
  node.style.setProperty("--a", strength.toFixed(3));
  return node;
}

const kindOf = (span) => `${span.by}: ${span.label.replace(/\s*\d+$/, "")}`;

/** Colours of all kinds of spans of a round, the same on every row. */
function colours(recording) {
  const kinds = distinct(recording.rows.flatMap((row) => row.spans.map(kindOf)));
  return new Map(kinds.map((kind, i) => [kind, `var(--s${i % 6})`]));
}

/** Lanes of spans that do not overlap; spans of one kind stay together where they can. */
function lanesOf(row) {
  const lanes = [];
  const ordered = [...row.spans].sort((a, b) => a.start - b.start || b.end - a.end);
  for (const span of ordered) {
    const free = (lane) => lane[lane.length - 1].end <= span.start;
    let lane = lanes.find((l) => kindOf(l[0]) === kindOf(span) && free(l));
    if (!lane) lanes.push((lane = []));
    lane.push(span);
  }
  return lanes;
}

// --- the top ---------------------------------------------------------------------------------------------------------

function choice(label, names, current, choose) {
  return make("span", { class: "choice", role: "group" }, make("span", { class: "soft" }, label), ...names.map((name, i) =>
    make("button", { "aria-pressed": String(i === current), onclick: () => choose(i) }, visible(name))));
}

function head(recording) {
  const groups = distinct(recording.rows.map((row) => row.group)).length;
  const many = recording.processes > 1 ? ` on ${recording.processes} processes` : "";
  return make("header", {},
    make("h1", {}, ...arrows([recording.trainer.toUpperCase(), ...recording.plugins.map((p) => visible(p.name))])),
    make("p", { class: "soft" }, `Round ${recording.round}, before step ${recording.step + 1}${many} · ` +
      `${recording.rows.length} rows in ${groups} groups · ${visible(recording.model)} · trl_ext ${visible(recording.trl_ext)}`),
    ...recording.notes.map((note) => make("p", {}, visible(note))),
    recordings.length > 1 ? make("p", {}, choice("round", recordings.map((r) => String(r.round)), recordings.indexOf(recording),
      (i) => { state.round = recordings[i]; draw(); })) : null);
}

function bar(recording, layers) {
  const layer = state.layer;
  const steps = layer.plusMinus ? [-1, -0.66, -0.33, -0.1, 0, 0.1, 0.33, 0.66, 1] : [0, 0.25, 0.5, 0.75, 1];
  const at = (s) => (layer.plusMinus ? s * layer.scale : layer.low + s * (layer.high - layer.low));
  const show = layer.plusMinus ? signed : number;
  return make("div", { class: "bar" },
    ...distinct(layers.map((l) => l.set)).map((set) => {
      const members = layers.filter((l) => l.set === set);
      return choice(set, members.map((l) => l.short), members.indexOf(layer), (i) => {
        state.layer = members[i];
        draw();
      });
    }),
    make("span", { class: "legend num" }, show(at(steps[0])),
      make("span", { class: "ramp" }, ...steps.map((s) => shaded(layer, at(s), { tag: "i" }))),
      show(at(1)), make("span", { class: "uncounted pill" }, "not counted by the loss")));
}

/** One small picture per group: every row is a line from TRL's advantage to the last plugin's. */
function overview(recording, groups, open) {
  const stages = recording.advantage_stages;
  const all = recording.rows.flatMap((row) => stages.map((_, i) => rowAdvantage(row, i)));
  const reach = Math.max(...all.map(Math.abs)) || 1;
  const [gap, height, left, top] = [96, 92, 34, 8];
  const width = left + 40 + gap * Math.max(1, stages.length - 1);
  const x = (i) => (stages.length > 1 ? left + 10 + gap * i : left + 10 + gap / 2);
  const y = (v) => top + height / 2 - (v / reach) * (height / 2 - 4);
  return make("div", { class: "overview" }, ...[...groups].map(([group, rows]) => {
    const lines = rows.flatMap((row) => {
      const points = stages.map((_, i) => [x(i), y(rowAdvantage(row, i))]);
      const last = rowAdvantage(row, stages.length - 1);
      const kind = last > 0 ? "plus" : last < 0 ? "minus" : "none";
      return [make("polyline", { class: `slope ${kind}`, points: points.map((p) => p.join()).join(" ") }),
        ...points.map(([cx, cy]) => make("circle", { class: `dot ${kind}`, cx, cy, r: 2.6 }))];
    });
    return make("button", { onclick: () => open(group), title: `open group ${group}` }, `group ${group}`,
      make("svg", { width, height: height + top + 18, role: "img", "aria-label": `advantages of group ${group} by stage` },
        make("line", { class: "axis", x1: left, x2: width - 8, y1: y(0), y2: y(0) }),
        make("text", { x: 0, y: y(reach) + 4 }, signed(reach)), make("text", { x: 0, y: y(0) + 4 }, "0"),
        make("text", { x: 0, y: y(-reach) + 4 }, signed(-reach)), ...lines,
        ...stages.map((by, i) => make("text", { x: x(i), y: height + top + 12, "text-anchor": "middle" }, visible(by)))));
  }));
}

// --- a group ---------------------------------------------------------------------------------------------------------

function table(recording, rows) {
  const columns = distinct(recording.reward_stages.flatMap((stage) => stage.names));
  const fields = distinct(rows.flatMap((row) => Object.keys(row.fields)));
  const rewardsOf = (row, column) => recording.reward_stages.map((stage, i) => {
    const place = stage.names.indexOf(column);
    return place < 0 ? undefined : row.rewards[i][place];
  });
  const ends = new Map(columns.map((c) => [c, range(recording.rows.flatMap((row) => finite(rewardsOf(row, c))))]));
  const total = (row, i) => {
    const known = row.rewards[i].map((v, k) => (v === null ? null : v * recording.reward_stages[i].weights[k]));
    return finite(known).length ? sum(finite(known)) : null;
  };
  const layer = state.layers[recording.advantage_stages.length - 1];
  const weights = new Map(recording.reward_stages.flatMap((s) => s.names.map((name, k) => [name, s.weights[k]])));
  return make("div", { class: "wide" }, make("table", { class: "num" },
    make("tr", {}, ...["row", "tokens"].map((t) => make("th", {}, t)),
      ...columns.map((c) => make("th", {}, visible(c) + (weights.get(c) === 1 ? "" : ` ×${number(weights.get(c))}`))),
      make("th", {}, "total"), ...recording.advantage_stages.map((by) => make("th", {}, `advantage: ${visible(by)}`)),
      ...fields.map((f) => make("th", {}, visible(f)))),
    ...rows.map((row) => make("tr", {},
      make("td", {}, make("a", { href: `#row-${row.row}` }, String(row.row))), make("td", {}, String(row.ids.length)),
      ...columns.map((c) => {
        const history = rewardsOf(row, c);
        const [low, high] = ends.get(c);
        const last = history[history.length - 1];
        const share = last === null || last === undefined ? 0 : high > low ? (last - low) / (high - low) : 1;
        return make("td", {}, ...arrows(history.map((v) => (v === undefined ? "none" : number(v)))),
          make("i", { class: "meter", style: { width: `${Math.round(100 * share)}%` } }));
      }),
      make("td", {}, ...arrows(recording.reward_stages.map((_, i) => number(total(row, i))))),
      ...recording.advantage_stages.map((_, i) => {
        const v = rowAdvantage(row, i);
        return shaded({ ...layer, plusMinus: true }, v, { tag: "td" }, signed(v));
      }),
      ...fields.map((f) => make("td", {}, row.fields[f] === undefined ? "" : value(row.fields[f])))))));
}

function groupOf(recording, group, rows, opened) {
  const facts = Object.entries(rows[0].columns).map(([name, v]) => ` · ${visible(name)} ${value(v)}`).join("");
  const body = make("div");
  const node = make("details", { class: "group", id: `group-${group}` },
    make("summary", {}, make("h2", {}, `Group ${group}`), make("span", { class: "soft" }, facts)), body);
  const fill = () => {
    if (body.childNodes.length) return;
    for (const prompt of distinct(rows.map((row) => row.prompt)))
      body.append(make("div", { class: "prompt" }, visible(recording.prompts[prompt].tokens.join(""))));
    body.append(table(recording, rows), ...rows.map((row) => rowOf(recording, row)));
  };
  node.addEventListener("toggle", () => node.open && fill()); // long rounds are drawn group by group
  if (opened) {
    node.open = true;
    fill();
  }
  return node;
}

// --- a row -----------------------------------------------------------------------------------------------------------

function rowOf(recording, row) {
  const layer = state.layers[recording.advantage_stages.length - 1];
  const pills = recording.advantage_stages.map((by, i) => {
    const v = rowAdvantage(row, i);
    return shaded(layer, v, { class: "pill num" }, `${visible(by)} ${signed(v)}`);
  });
  const lanes = lanesOf(row);
  const values = state.layer.of(row);
  const nodes = [];
  const tokens = make("div", { class: "tokens", style: { "line-height": String(1.75 + 0.3 * lanes.length) } });
  const starts = new Map();
  lanes.forEach((lane) => lane.forEach((span) => starts.set(span.start, [...(starts.get(span.start) ?? []), span])));
  row.tokens.forEach((text, i) => {
    for (const span of starts.get(i) ?? []) tokens.append(labelOf(span));
    const parts = text === "" ? [make("span", { class: "mark" }, "·")] : visible(text).split(/(\n)/).filter((p) => p).flatMap(
      (part) => (part === "\n" ? [make("span", { class: "mark" }, "⏎"), "\n"] : [part]));
    const node = shaded(state.layer, values[i], { class: "t" }, ...parts);
    node.dataset.at = i;
    const shadows = lanes.flatMap((lane, k) => {
      const span = lane.find((s) => s.start <= i && i < s.end);
      const colour = span ? state.colours.get(kindOf(span)) : "var(--card)";
      return [`0 ${1 + 4 * k}px 0 0 var(--card)`, `0 ${4 + 4 * k}px 0 0 ${colour}`];
    });
    if (shadows.length) node.style.setProperty("box-shadow", shadows.join(", "));
    nodes.push(node);
    tokens.append(node);
  });
  const tracks = tracksOf(recording, row, lanes, values);
  const card = make("section", { class: "row", id: `row-${row.row}` },
    make("header", {}, make("b", {}, `row ${row.row}`), make("span", { class: "soft" }, `${row.ids.length} tokens`),
      make("span", { class: "changes" }, ...arrows(pills)),
      row.kept ? null : make("span", { class: "uncounted pill" }, "left out: the round does not learn from it")),
    tokens, tracks, callsOf(row));
  follow(recording, row, card, tokens, tracks, nodes);
  return card;
}

function labelOf(span) {
  const end = span.value === null ? "" : ` ${number(span.value)}`;
  return make("span", { class: "label", style: { background: state.colours.get(kindOf(span)) }, title: kindOf(span) },
    visible(span.label) + end);
}

function callsOf(row) {
  if (!row.calls.length) return null;
  return make("div", { class: "calls" }, `${row.calls.length} tool call${row.calls.length > 1 ? "s" : ""}`,
    ...row.calls.map((call) => make("div", {}, make("code", {}, `${visible(call.name)}(${value(call.arguments)})`),
      make("span", { class: "soft" }, " → "), make("code", {}, value(call.result)))));
}

/** Pictures over the same axis of tokens: the coloured layer, spans, curves and other values. */
function tracksOf(recording, row, lanes, values) {
  const length = Math.max(1, row.ids.length);
  const box = make("div", { class: "tracks num" });
  const add = (name, height, shapes, ends = "") => box.append(
    make("div", { class: "name" }, visible(name)),
    make("div", { class: "track" }, make("svg", { height, viewBox: `0 0 ${length} 1`, preserveAspectRatio: "none" }, ...shapes),
      make("div", { class: "cursor", hidden: "" })),
    make("div", { class: "ends" }, ends));
  const others = lanes.length + row.curves.length + Object.keys(row.values).length > 0;
  if (others || distinct(values).length > 1) add(state.layer.name, 14, stripes(state.layer, values));
  for (const lane of lanes)
    add(distinct(lane.map(kindOf)).join(", "), 9, lane.map((span) => make("rect", {
      x: span.start + 0.06, width: span.end - span.start - 0.12, y: 0, height: 1, rx: 0.1,
      style: { fill: state.colours.get(kindOf(span)) } })));
  for (const curve of row.curves) {
    const same = recording.rows.flatMap((r) => r.curves.filter((c) => c.name === curve.name && c.by === curve.by));
    const [low, high] = range(finite(same.flatMap((c) => c.values)));
    if (!Number.isFinite(low)) continue;
    add(`${curve.by}: ${curve.name}`, 36, lineOf(curve, low, high, length), `${number(low)} … ${number(high)}`);
  }
  for (const layer of state.layers)
    if (!layer.plusMinus && layer !== state.layer && row.values[layer.name])
      add(layer.name, 10, stripes(layer, layer.of(row)), `${number(layer.low)} … ${number(layer.high)}`);
  return box;
}

/** Rectangles for stretches of equal colour. */
function stripes(layer, values) {
  const shapes = [];
  for (let i = 0, start = 0; i <= values.length; i++) {
    if (i < values.length && values[i] === values[start]) continue;
    if (i > start) {
      const [kind, strength] = shade(layer, values[start]);
      if (kind !== "none") shapes.push(make("rect", { class: `fill ${kind}`, x: start, width: i - start, y: 0, height: 1,
        style: { "--a": strength.toFixed(3) } }));
    }
    start = i;
  }
  return shapes;
}

function lineOf(curve, low, high, length) {
  const y = (v) => (high > low ? 0.94 - 0.88 * ((v - low) / (high - low)) : 0.5);
  const shapes = low < 0 && high > 0 ? [make("line", { class: "zero", x1: 0, x2: length, y1: y(0), y2: y(0) })] : [];
  let part = [];
  const end = () => {
    if (part.length) shapes.push(make("polyline", { class: "curve", points: part.join(" ") }));
    part = [];
  };
  const points = [];
  curve.positions.forEach((position, i) => {
    if (curve.values[i] === null) return end();
    const [x, at] = [position + 0.5, y(curve.values[i]).toFixed(4)];
    part.push(`${x},${at}`);
    points.push(make("line", { class: "point", x1: x, x2: x, y1: at, y2: at }));
  });
  end();
  return [...shapes, ...(points.length <= 60 ? points : [])];
}

// --- what is under the pointer ---------------------------------------------------------------------------------------

const tip = make("div", { id: "tip", hidden: "" });

function tipOf(recording, row, i) {
  const line = (name, text) => make("tr", {}, make("td", {}, name), make("td", { class: "mono" }, text));
  const advantages = recording.advantage_stages.map((by, stage) => {
    const found = row.advantages[stage];
    return line(`advantage: ${visible(by)}`, signed(Array.isArray(found) ? found[i] : found));
  });
  const values = Object.entries(row.values).map(([name, all]) => line(visible(name), number(all[i])));
  const spans = row.spans.filter((s) => s.start <= i && i < s.end).map((s) =>
    line(visible(s.by), visible(s.label) + (s.value === null ? "" : ` = ${number(s.value)}`)));
  const curves = row.curves.filter((c) => c.positions.includes(i)).map((c) =>
    line(visible(`${c.by}: ${c.name}`), number(c.values[c.positions.indexOf(i)])));
  return [make("div", { class: "text mono" }, visible(JSON.stringify(row.tokens[i]))),
    make("div", { class: "soft" }, `token ${i}, id ${row.ids[i]}${row.mask[i] ? "" : ", not counted by the loss"}`),
    make("table", {}, ...advantages, ...values, ...spans, ...curves)];
}

/** Ties tokens and tracks of a row together: pointing at either marks the place in both. */
function follow(recording, row, card, tokens, tracks, nodes) {
  let here = null;
  const point = (i, event) => {
    if (here !== null) nodes[here].classList.remove("here");
    here = i;
    for (const cursor of tracks.querySelectorAll(".cursor")) {
      cursor.hidden = i === null;
      if (i !== null) cursor.style.left = `${(100 * (i + 0.5)) / row.ids.length}%`;
    }
    tip.hidden = i === null;
    if (i === null) return;
    nodes[i].classList.add("here");
    tip.replaceChildren(...tipOf(recording, row, i));
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
    tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18}px`;
  };
  tokens.addEventListener("pointermove", (event) => {
    const node = event.target.closest(".t");
    point(node ? Number(node.dataset.at) : null, event);
  });
  tracks.addEventListener("pointermove", (event) => {
    const track = event.target.closest(".track");
    if (!track || !row.ids.length) return point(null, event);
    const { left, width } = track.getBoundingClientRect();
    point(Math.max(0, Math.min(row.ids.length - 1, Math.floor(((event.clientX - left) / width) * row.ids.length))), event);
  });
  card.addEventListener("pointerleave", (event) => point(null, event));
}

// --- everything ------------------------------------------------------------------------------------------------------

function draw() {
  const recording = state.round;
  const place = scrollY;
  const opened = new Set([...document.querySelectorAll("details[open]")].map((node) => node.id));
  state.layers = layersOf(recording);
  const name = state.layer?.name;
  state.layer = state.layers.find((l) => l.name === name) ?? state.layers[recording.advantage_stages.length - 1];
  state.colours = colours(recording);
  const groups = new Map();
  for (const row of recording.rows) groups.set(row.group, [...(groups.get(row.group) ?? []), row]);
  const last = recording.advantage_stages.length - 1;
  const differ = (rows) => distinct(rows.map((row) => rowAdvantage(row, last))).length > 1;
  const telling = ([...groups].find(([, rows]) => differ(rows)) ?? [...groups][0])[0];
  const parts = [...groups].map(([group, rows]) =>
    groupOf(recording, group, rows, opened.size ? opened.has(`group-${group}`) : group === telling));
  const open = (group) => {
    const node = document.getElementById(`group-${group}`);
    node.open = true;
    node.scrollIntoView({ behavior: "smooth" });
  };
  document.querySelector("main").replaceChildren(head(recording), bar(recording, state.layers),
    overview(recording, groups, open), ...parts);
  scrollTo(0, place);
  document.title = `round ${recording.round}: ${[recording.trainer.toUpperCase(), ...recording.plugins.map((p) => p.name)].join(" → ")}`;
}

document.body.append(tip);
draw();
