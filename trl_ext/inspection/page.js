"use strict";
// Draws the rounds in #data, whose labels, shares and shades are made by page_data.py. Text of models, data and plugins
// reaches the page through text nodes only.

const rounds = JSON.parse(document.getElementById("data").textContent);
const state = { round: rounds[0], layer: rounds[0].layer };

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

const arrows = (nodes) => nodes.flatMap((node, i) => (i ? [make("span", { class: "arrow" }, "→"), node] : [node]));
/** A shade for each token: pages hold one for all where they are equal. */
function shadesOf(row, layer) {
  const shades = row.shades[layer];
  return Array.isArray(shades) ? shades : row.ids.map(() => shades);
}

const colourOf = (span) => `var(--s${span.colour})`;

/** The class of a shade: plus, minus or none with a sign, other without one, uncounted for null. */
function classOf(shade, signed = true) {
  if (shade === null) return "uncounted";
  if (!signed) return "other";
  return shade > 0 ? "plus" : shade < 0 ? "minus" : "none";
}

function shaded(tag, shade, signed, name, ...children) {
  return make(tag, { class: `${name} ${classOf(shade, signed)}`, style: { "--a": String(Math.abs(shade)) } }, ...children);
}

// --- the top ---------------------------------------------------------------------------------------------------------

function choice(label, names, current, choose) {
  return make("span", { class: "choice", role: "group" }, make("span", { class: "soft" }, label), ...names.map((name, i) =>
    make("button", { "aria-pressed": String(i === current), onclick: () => choose(i) }, name)));
}

function head(round) {
  const chosen = (i) => {
    state.layer = rounds[i].layers.findIndex((layer) => layer.name === round.layers[state.layer].name);
    if (state.layer < 0) state.layer = rounds[i].layer;
    state.round = rounds[i];
    draw();
  };
  return make("header", {}, make("h1", {}, ...arrows(round.names)), make("p", { class: "soft" }, round.facts),
    ...round.notes.map((note) => make("p", {}, note)),
    rounds.length > 1 ? make("p", {}, choice("round", rounds.map((r) => String(r.round)), rounds.indexOf(round), chosen)) : null);
}

function bar(round) {
  const layer = round.layers[state.layer];
  const sets = [...new Set(round.layers.map((l) => l.set))];
  return make("div", { class: "bar" },
    ...sets.map((set) => {
      const members = round.layers.filter((l) => l.set === set);
      return choice(set, members.map((l) => l.short), members.indexOf(layer), (i) => {
        state.layer = round.layers.indexOf(members[i]);
        draw();
      });
    }),
    make("span", { class: "legend num" }, layer.ends[0],
      make("span", { class: "ramp" }, ...layer.ramp.map((shade) => shaded("i", shade, layer.signed, ""))),
      layer.ends[1], make("span", { class: "uncounted pill" }, "not counted by the loss")));
}

/** One small picture per group: every row is a line from TRL's advantage to the last plugin's. */
function overview(round, open) {
  const { stages, ends } = round;
  const [gap, height, left, top] = [96, 92, 34, 8];
  const width = left + 40 + gap * Math.max(1, stages.length - 1);
  const x = (i) => (stages.length > 1 ? left + 10 + gap * i : left + 10 + gap / 2);
  const y = (share) => top + height / 2 - share * (height / 2 - 4);
  return make("div", { class: "overview" }, ...round.groups.map(({ group, slopes }) => {
    const lines = slopes.flatMap(({ sign, shares }) => {
      const points = shares.map((share, i) => [x(i), y(share)]);
      const kind = classOf(sign);
      return [make("polyline", { class: `slope ${kind}`, points: points.map((p) => p.join()).join(" ") }),
        ...points.map(([cx, cy]) => make("circle", { class: `dot ${kind}`, cx, cy, r: 2.6 }))];
    });
    return make("button", { onclick: () => open(group), title: `open group ${group}` }, `group ${group}`,
      make("svg", { width, height: height + top + 18, role: "img", "aria-label": `advantages of group ${group} by stage` },
        make("line", { class: "axis", x1: left, x2: width - 8, y1: y(0), y2: y(0) }),
        ...ends.map((label, i) => make("text", { x: 0, y: y(1 - i) + 4 }, label)), ...lines,
        ...stages.map((by, i) => make("text", { x: x(i), y: height + top + 12, "text-anchor": "middle" }, by))));
  }));
}

// --- a group ---------------------------------------------------------------------------------------------------------

function table({ heads, rows }) {
  return make("div", { class: "wide" }, make("table", { class: "num" },
    make("tr", {}, ...heads.map((text) => make("th", {}, text))),
    ...rows.map(({ row, cells }) => make("tr", {},
      make("td", {}, make("a", { href: `#row-${row}` }, String(row))),
      ...cells.map(({ texts, shade, meter }) => {
        const nodes = arrows(texts);
        if (meter !== undefined) nodes.push(make("i", { class: "meter", style: { width: `${Math.round(100 * meter)}%` } }));
        return shade === undefined ? make("td", {}, ...nodes) : shaded("td", shade, true, "", ...nodes);
      })))));
}

function groupOf(round, group, opened) {
  const body = make("div");
  const node = make("details", { class: "group", id: `group-${group.group}` },
    make("summary", {}, make("h2", {}, `Group ${group.group}`), make("span", { class: "soft" }, group.facts)), body);
  const fill = () => {
    if (body.childNodes.length) return;
    body.append(...group.prompts.map((prompt) => make("div", { class: "prompt" }, prompt)), table(group.table),
      ...group.rows.map((row) => rowOf(round, row)));
  };
  node.addEventListener("toggle", () => node.open && fill()); // long rounds are drawn group by group
  if (opened) {
    node.open = true;
    fill();
  }
  return node;
}

// --- a row -----------------------------------------------------------------------------------------------------------

function rowOf(round, row) {
  const layer = round.layers[state.layer], shades = shadesOf(row, state.layer);
  const pills = row.pills.map(({ text, shade }) => shaded("span", shade, true, "pill num", text));
  const tokens = make("div", { class: "tokens", style: { "line-height": String(1.75 + 0.3 * row.lanes.length) } });
  const nodes = row.tokens.map((text, i) => {
    for (const span of row.lanes.flat().filter((s) => s.start === i)) tokens.append(labelOf(span));
    const mark = (sign) => make("span", { class: "mark" }, sign);
    const lines = text.split("\n").flatMap((line, k) => (k ? [mark("⏎"), "\n", line] : [line])).filter((part) => part !== "");
    const node = shaded("span", shades[i], layer.signed, "t", ...(text === "" ? [mark("·")] : lines));
    node.dataset.at = i;
    // a line under the token for each lane, in the colour of its span
    const shadows = row.lanes.flatMap((lane, k) => {
      const span = lane.find((s) => s.start <= i && i < s.end);
      return [`0 ${1 + 4 * k}px 0 0 var(--card)`, `0 ${4 + 4 * k}px 0 0 ${span ? colourOf(span) : "var(--card)"}`];
    });
    if (shadows.length) node.style.setProperty("box-shadow", shadows.join(", "));
    tokens.append(node);
    return node;
  });
  const tracks = tracksOf(round, row);
  const card = make("section", { class: "row", id: `row-${row.row}` },
    make("header", {}, make("b", {}, `row ${row.row}`), make("span", { class: "soft" }, `${row.ids.length} tokens`),
      make("span", { class: "changes" }, ...arrows(pills)),
      row.kept ? null : make("span", { class: "uncounted pill" }, "left out: the round does not learn from it")),
    tokens, tracks, callsOf(row));
  follow(row, card, tokens, tracks, nodes);
  return card;
}

const labelOf = (span) => make("span", { class: "label", style: { background: colourOf(span) }, title: span.kind }, span.label);

function callsOf(row) {
  if (!row.calls.length) return null;
  return make("div", { class: "calls" }, row.calls_head, ...row.calls.map(({ call, result }) =>
    make("div", {}, make("code", {}, call), make("span", { class: "soft" }, " → "), make("code", {}, result))));
}

/** Pictures over the same axis of tokens: the coloured layer, spans, curves and other values. */
function tracksOf(round, row) {
  const length = Math.max(1, row.ids.length), layer = round.layers[state.layer], shades = shadesOf(row, state.layer);
  const box = make("div", { class: "tracks num" });
  const add = (name, height, shapes, ends = "") => box.append(
    make("div", { class: "name" }, name),
    make("div", { class: "track" }, make("svg", { height, viewBox: `0 0 ${length} 1`, preserveAspectRatio: "none" }, ...shapes),
      make("div", { class: "cursor", hidden: "" })),
    make("div", { class: "ends" }, ends));
  const others = row.lanes.length + row.curves.length + Object.keys(row.values).length > 0;
  if (others || new Set(shades).size > 1) add(layer.name, 14, stripes(shades, layer.signed));
  for (const lane of row.lanes)
    add([...new Set(lane.map((span) => span.kind))].join(", "), 9, lane.map((span) => make("rect", {
      x: span.start + 0.06, width: span.end - span.start - 0.12, y: 0, height: 1, rx: 0.1, style: { fill: colourOf(span) } })));
  for (const curve of row.curves) add(curve.name, 36, lineOf(curve, length), curve.ends);
  round.layers.forEach((other, i) => {
    if (!other.signed && other !== layer && Object.hasOwn(row.values, other.name))
      add(other.name, 10, stripes(shadesOf(row, i), false), row.values[other.name]);
  });
  return box;
}

/** Rectangles for stretches of equal colour. */
function stripes(shades, signed) {
  const shapes = [];
  for (let i = 0, start = 0; i <= shades.length; i++) {
    if (i < shades.length && shades[i] === shades[start]) continue;
    const kind = classOf(shades[start] ?? null, signed);
    if (i > start && kind !== "none")
      shapes.push(make("rect", { class: `fill ${kind}`, x: start, width: i - start, y: 0, height: 1,
        style: { "--a": String(Math.abs(shades[start])) } }));
    start = i;
  }
  return shapes;
}

function lineOf(curve, length) {
  const shapes = curve.zero === null ? [] : [make("line", { class: "zero", x1: 0, x2: length, y1: curve.zero, y2: curve.zero })];
  const points = [];
  let stretch = [];
  const end = () => {
    if (stretch.length) shapes.push(make("polyline", { class: "curve", points: stretch.join(" ") }));
    stretch = [];
  };
  curve.positions.forEach((position, i) => {
    const [x, y] = [position + 0.5, curve.heights[i]];
    if (y === null) return end();
    stretch.push(`${x},${y}`);
    points.push(make("line", { class: "point", x1: x, x2: x, y1: y, y2: y }));
  });
  end();
  return [...shapes, ...(points.length <= 60 ? points : [])];
}

// --- what is under the pointer ---------------------------------------------------------------------------------------

const tip = make("div", { id: "tip", hidden: "" });

function tipOf(row, i) {
  const line = (name, text) => make("tr", {}, make("td", {}, name), make("td", { class: "mono" }, text));
  const labels = Object.entries(row.labels).map(([name, label]) => line(name, Array.isArray(label) ? label[i] : label));
  const spans = row.lanes.flat().filter((s) => s.start <= i && i < s.end).map((s) => line(s.by, s.tip));
  const curves = row.curves.filter((c) => c.positions.includes(i)).map((c) => line(c.name, c.labels[c.positions.indexOf(i)]));
  return [make("div", { class: "text mono" }, JSON.stringify(row.tokens[i])),
    make("div", { class: "soft" }, `token ${i}, id ${row.ids[i]}${row.mask[i] ? "" : ", not counted by the loss"}`),
    make("table", {}, ...labels, ...spans, ...curves)];
}

/** Ties tokens and tracks of a row together: pointing at either marks the place in both. */
function follow(row, card, tokens, tracks, nodes) {
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
    tip.replaceChildren(...tipOf(row, i));
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
  const { round } = state, place = scrollY;
  const opened = new Set([...document.querySelectorAll("details[open]")].map((node) => node.id));
  const groups = round.groups.map((group) =>
    groupOf(round, group, opened.size ? opened.has(`group-${group.group}`) : group.open));
  const open = (group) => {
    const node = document.getElementById(`group-${group}`);
    node.open = true;
    node.scrollIntoView({ behavior: "smooth" });
  };
  document.querySelector("main").replaceChildren(head(round), bar(round), overview(round, open), ...groups);
  scrollTo(0, place);
  document.title = round.title;
}

document.body.append(tip);
draw();
