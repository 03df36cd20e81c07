// What every device holds at its peak, by kind, against what it may hold; and how that changes over the step.
import { h, hideTip, right, showTip, svg, table } from "./dom.js";
import { digits, gib, percent, seconds } from "./format.js";

const KINDS = [["parameters", "--forward"], ["gradients", "--weight"], ["optimizer", "--optimizer"],
  ["activations", "--backward"], ["buffers", "--comm"]];
export const peak = (row) => KINDS.reduce((sum, [name]) => sum + row.memory_gib[name], 0);

export function memory(rows, step) {
  const scale = Math.max(...rows.map((row) => Math.max(row.usable_gib, peak(row)))) * 1.03;
  const bars = rows.map((row) => h("div", { class: "memory-row" },
    h("div", {}, `stage ${row.stage} `, h("span", { class: "soft" }, `${row.types.join(", ")} \u00d7 ${row.num_devices}`)),
    h("div", { class: "track" },
      h("div", { class: "bar" }, KINDS.map(([name, colour]) => h("i", {
        style: { width: `${100 * row.memory_gib[name] / scale}%`, background: `var(${colour})` },
        onpointermove: (event) => showTip(`${name}: ${gib(row.memory_gib[name])} of ${gib(peak(row))} at the peak`, event),
        onpointerleave: hideTip,
      }))),
      h("u", { style: { left: `${100 * row.usable_gib / scale}%` }, title: `limit ${gib(row.usable_gib)}` })),
    h("div", { class: "num" }, peak(row) < 0.1 ? `${gib(peak(row))} / ${gib(row.usable_gib)}` : `${digits(peak(row), 3)} / ${gib(row.usable_gib)}`)));
  const legend = h("div", { class: "legend" }, KINDS.map(([name, colour]) =>
    h("span", {}, h("i", { style: { background: `var(${colour})` } }), name)),
  h("span", {}, h("i", { style: { background: "var(--warn)", width: "3px" } }), "limit of the smallest device"));
  const curves = rows.some((row) => row.memory_curve.length)
    ? [h("h3", {}, "over the step"), ...rows.filter((row) => row.drawn !== false).map((row) => curve(row, step))] : [];
  return h("div", {}, bars, legend, curves);
}

function curve(row, step) {
  const width = 1000, height = 56, low = peak(row) < 0.25 * row.usable_gib;  // then the limit is off the scale
  const most = (low ? peak(row) : Math.max(row.usable_gib, peak(row))) * 1.04 || 1;
  const x = (time) => width * time / step, y = (size) => height - height * size / most;
  let path = `M0 ${height}`, last = 0;
  for (const [time, size] of row.memory_curve) {
    path += `H${x(time).toFixed(2)}V${y(size).toFixed(2)}`;
    last = size;
  }
  path += `H${width}V${height}Z`;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", height, preserveAspectRatio: "none", role: "img",
    "aria-label": `Memory of stage ${row.stage} over the step, last ${gib(last)}` },
  svg("path", { d: path, fill: "var(--forward)", "fill-opacity": "0.35", stroke: "var(--forward)", "vector-effect": "non-scaling-stroke" }),
  low ? null : svg("line", { x1: 0, x2: width, y1: y(row.usable_gib), y2: y(row.usable_gib), stroke: "var(--warn)", "stroke-dasharray": "6 4",
    "vector-effect": "non-scaling-stroke" }));
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect(), time = (event.clientX - box.left) / box.width * step;
    const before = row.memory_curve.filter(([at]) => at <= time).at(-1);
    showTip(`stage ${row.stage} at ${seconds(time)}: ${gib(before ? before[1] : 0)} allocated, limit ${gib(row.usable_gib)}`, event);
  });
  drawing.addEventListener("pointerleave", hideTip);
  const largest = row.memory_curve.reduce((most, [, size]) => Math.max(most, size), 0);
  return h("div", { class: "memory-row" }, h("div", {}, `stage ${row.stage}`), drawing, h("div", { class: "num soft" }, `up to ${gib(largest)}${low ? ", far from the limit" : ""}`));
}

export function memoryTable(rows) {
  const columns = ["stage", "devices", "ranks", ...KINDS.map(([name]) => right(name)), right("peak GiB"), right("limit GiB"), right("full")];
  return table(columns, rows.map((row) => [row.stage, `${row.num_devices} x ${row.types.join(", ")}`, row.ranks,
    ...KINDS.map(([name]) => row.memory_gib[name].toFixed(3)), peak(row).toFixed(2), row.usable_gib.toFixed(2),
    percent(peak(row) / row.usable_gib)]));
}

