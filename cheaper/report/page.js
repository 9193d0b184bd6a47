// Draws CHARTS ({metric, unit, runs, colours, curves: [[tokens, values], …]}) into the page's .chart elements.
"use strict";

const shown = new Set(Array.from(document.querySelectorAll("[data-run]"), (box) => box.dataset.run));
const logarithmic = document.getElementById("logarithmic");
const smoothing = document.getElementById("smoothing");
const ink = getComputedStyle(document.documentElement).getPropertyValue("--faint");
const line = getComputedStyle(document.documentElement).getPropertyValue("--line");
let plots = [];

function tokens(count) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
    if (count >= size) return +(count / size).toPrecision(3) + unit;
  return String(count);
}

// An exponential mean whose first values are not drawn towards zero.
function smoothed(values, weight) {
  let mean = 0, mass = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return mean / mass;
  });
}

function draw(element) {
  const chart = CHARTS.find((chart) => chart.metric === element.dataset.metric);
  const visible = chart.runs.map((_, i) => i).filter((i) => shown.has(chart.runs[i]));
  element.replaceChildren();
  const title = element.appendChild(document.createElement("h3"));
  title.textContent = chart.metric + " ";
  title.appendChild(document.createElement("small")).textContent = chart.unit;
  const values = element.appendChild(document.createElement("div"));
  values.className = "values";
  if (!visible.length) return;

  const positive = visible.every((i) => chart.curves[i][1].every((value) => value === null || value > 0));
  const tables = visible.map((i) => [chart.curves[i][0], smoothed(chart.curves[i][1], +smoothing.value)]);
  const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 } };
  const options = {
    width: element.clientWidth,
    height: 230,
    legend: { show: false },
    cursor: { sync: { key: "tokens" } },
    scales: { x: { time: false }, y: { distr: logarithmic.checked && positive ? 3 : 1 } },
    axes: [
      { ...axis, values: (_, ticks) => ticks.map(tokens) },
      { ...axis, size: 62, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : +tick.toPrecision(4))) },
    ],
    series: [{}, ...visible.map((i) => ({ stroke: chart.colours[i], width: 1.5, spanGaps: true }))],
    hooks: {
      setCursor: [(plot) => {
        const at = plot.cursor.idx;
        values.textContent = at === null || at === undefined ? "" : "at " + tokens(plot.data[0][at]);
        visible.forEach((run, i) => {
          const value = at === null || at === undefined ? null : plot.data[i + 1][at];
          if (value === null || value === undefined) return;
          const figure = values.appendChild(document.createElement("span"));
          figure.style.color = chart.colours[run];
          figure.textContent = "  " + value.toPrecision(4);
        });
      }],
    },
  };
  plots.push(new uPlot(options, uPlot.join(tables), element));
}

function drawAll() {
  plots.forEach((plot) => plot.destroy());
  plots = [];
  document.querySelectorAll(".chart").forEach(draw);
}

document.querySelectorAll("[data-run]").forEach((box) => box.addEventListener("change", () => {
  if (box.checked) shown.add(box.dataset.run); else shown.delete(box.dataset.run);
  drawAll();
}));
[logarithmic, smoothing].forEach((control) => control.addEventListener("input", drawAll));
window.addEventListener("resize", drawAll);
drawAll();
