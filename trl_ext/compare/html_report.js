"use strict";
// Shows the numbers under the pointer, and the completions of the chosen seed and round.

const data = JSON.parse(document.getElementById("data").textContent);

/** Maps a place in a chart to a number, with what the chart says about itself. */
function scaleOf(text) {
  const [low, high, start, end] = text.split(" ").map(Number);
  return {
    number: (place) => low + ((place - start) / (end - start)) * (high - low),
    place: (number) => start + ((number - low) / (high - low)) * (end - start),
  };
}

const nearest = (values, wanted) =>
  values.reduce((best, value, i) => (Math.abs(value - wanted) < Math.abs(values[best] - wanted) ? i : best), 0);

/** Shows lines and a cursor while the pointer is over a chart. `read(x, y)` returns the number to mark and the lines. */
function follow(chart, read) {
  const x = scaleOf(chart.dataset.x), y = scaleOf(chart.dataset.y), cursor = chart.querySelector(".cursor");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  chart.parentElement.append(tip);
  chart.addEventListener("mousemove", (event) => {
    const box = chart.getBoundingClientRect(), unit = box.width / chart.viewBox.baseVal.width;
    const [marked, lines] = read(x.number((event.clientX - box.left) / unit), y.number((event.clientY - box.top) / unit));
    tip.replaceChildren(...lines.map((line) => Object.assign(document.createElement("div"), { textContent: line })));
    cursor.setAttribute("x1", x.place(marked));
    cursor.setAttribute("x2", x.place(marked));
    cursor.style.visibility = "visible";
    tip.hidden = false;
    tip.style.left = Math.min(x.place(marked) * unit + 10, box.width - tip.offsetWidth) + "px";
  });
  chart.addEventListener("mouseleave", () => {
    tip.hidden = true;
    cursor.style.visibility = "hidden";
  });
}

for (const chart of document.querySelectorAll("svg.curves")) {
  const arms = data.curves[chart.dataset.metric];
  follow(chart, (wanted) => {
    const lines = Object.entries(arms).map(([arm, curve]) => {
      const i = nearest(curve.steps, wanted);
      const band = curve.low ? ` [${curve.low[i].toPrecision(3)}, ${curve.high[i].toPrecision(3)}]` : "";
      return [curve.steps[i], `${arm}: ${curve.mean[i].toPrecision(3)}${band}`];
    });
    return [lines[0][0], [`step ${lines[0][0]}`, ...lines.map(([, line]) => line)]];
  });
}

for (const chart of document.querySelectorAll("svg.seeds")) {
  const arms = Object.entries(data.metrics[chart.dataset.metric].values).filter(([, values]) => Object.keys(values).length);
  follow(chart, (wanted, row) => {
    const [arm, values] = arms[Math.max(0, Math.min(arms.length - 1, Math.round(row)))];
    const seeds = Object.keys(values), seed = seeds[nearest(Object.values(values), wanted)];
    return [values[seed], [`${arm}, ${data.paired ? "seed" : "run"} ${seed}: ${values[seed].toPrecision(3)}`]];
  });
}

const choosers = [...document.querySelectorAll(".choose select")];
function choose() {
  const wanted = choosers.map((chooser) => chooser.value).join("/");
  for (const rows of document.querySelectorAll("[data-rows]")) rows.hidden = rows.dataset.rows !== wanted;
}
for (const chooser of choosers) chooser.addEventListener("change", choose);
