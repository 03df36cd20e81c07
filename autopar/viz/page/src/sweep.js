// A sweep: the best plan at each batch, sequence and cluster size, as lines, and what twice the devices would buy.
import { h, hideTip, right, showTip, svg, table } from "./dom.js";
import { digits, percent, seconds } from "./format.js";

const money = (value) => `$${digits(value, 3)}`;
const X = [["devices", "devices"], ["global_batch", "global batch"], ["seq_len", "sequence"]];
const Y = [["tokens_per_s", "tokens/s", (v) => digits(v, 4)], ["tokens_per_s_per_device", "tokens/s a device", (v) => digits(v, 4)],
  ["step_time_s", "step time", seconds], ["mfu", "MFU", (v) => percent(v)], ["memory_share", "memory of the fullest device", (v) => percent(v, 0)],
  ["price_per_million_tokens", "price of a million tokens", money]];

export function sweep({ sweep: data }, themeButton) {
  const { rows, doublings, model } = data;
  document.title = `${model}: a sweep`;
  const axes = X.filter(([key]) => new Set(rows.map((row) => row[key])).size > 1);
  const measures = Y.filter(([key]) => rows.some((row) => row[key] !== null && row[key] !== undefined));
  let x = axes[0] ?? X[0], y = measures[0] ?? Y[0];
  const place = h("div", {});
  const draw = () => place.replaceChildren(chart(rows, x, y, axes));
  const choose = (label, options, chosen, pick) => h("label", { class: "soft" }, `${label} `, h("select", { "aria-label": label, onchange: (event) => {
    pick(options[event.target.selectedIndex]);
    draw();
  } }, options.map((option) => h("option", { selected: option === chosen }, option[1]))));
  draw();
  document.addEventListener("theme", draw);
  const fitting = rows.filter((row) => row.feasible), best = fitting.reduce((a, b) => (!a || b.tokens_per_s > a.tokens_per_s ? b : a), null);
  const early = rows.filter((row) => row.stopped_early).length;
  const words = `${rows.length} points, ${fitting.length} with a plan that fits${early ? `; the search of ${early} was stopped early` : ""}`;
  return h("main", {},
    h("header", { class: "top" }, h("div", {}, h("h1", {}, `${model}: the best plan at each size`), h("div", { class: "soft" }, words)),
      h("div", { class: "tools" }, themeButton)),
    best ? h("div", { class: "tiles" }, [[`${digits(best.tokens_per_s, 4)}`, `most tokens/s: ${best.cluster}, batch ${best.global_batch}`],
      ...bestOf(fitting, "mfu", (row) => [percent(row.mfu), `highest MFU: ${row.cluster}, batch ${row.global_batch}`]),
      ...bestOf(doublings.filter((gain) => gain.speedup !== null), "speedup",
        (gain) => [`${digits(gain.speedup, 3)}\u00d7`, `most that twice the devices buy: ${gain.from} to ${gain.to}, ${batches(gain)}`]),
    ].map(([value, name]) => h("div", { class: "tile" }, h("b", {}, value), h("span", {}, name)))) : null,
    h("section", { id: "plot" }, h("div", { class: "head" }, h("h2", {}, "Plot"), h("p", {}, "each point is the best plan found there; hover for it"),
      measures.length > 1 ? choose("show", measures, y, (picked) => { y = picked; }) : null,
      axes.length > 1 ? choose("over", axes, x, (picked) => { x = picked; }) : null), place),
    doublings.length ? h("section", { id: "doublings" }, h("div", { class: "head" }, h("h2", {}, "What twice the devices would buy"),
      h("p", {}, "the bar is full where twice the devices give twice the tokens/s")), h("div", {}, doublings.map(gainBar))) : null,
    h("section", { id: "points" }, h("div", { class: "head" }, h("h2", {}, "All points")), h("div", { class: "scroll" }, pointsTable(rows))));
}

function bestOf(rows, key, make) {
  const best = rows.reduce((a, b) => (!a || b[key] > a[key] ? b : a), null);
  return best ? [make(best)] : [];
}

function gainBar(gain) {
  const told = gain.speedup === null ? (gain.only === "neither" ? "neither fits" : `only ${gain.only} fits`)
    : `${digits(gain.speedup, 3)}\u00d7 (${percent(gain.speedup / 2, 0)} of twice)`;
  return h("div", { class: "gains" }, h("div", { class: "baseline gain" }, h("div", {}, `${gain.from} \u2192 ${gain.to}`,
    h("div", { class: "soft" }, `${batches(gain)}${gain.seq_len ? `, sequence ${gain.seq_len}` : ""}`)),
    h("div", { class: "track" }, h("i", { style: { width: `${Math.min(100, 50 * (gain.speedup ?? 0))}%`, background: "var(--accent)" } })), h("div", { class: "num" }, told)),
    h("p", { class: "soft" }, `${gain.words}.`));
}

const batches = (gain) => `batch ${gain.global_batch}${gain.to_global_batch === gain.global_batch ? "" : ` \u2192 ${gain.to_global_batch}`}`;

function pointsTable(rows) {
  return table(["cluster", right("devices"), right("batch"), right("sequence"), right("step"), right("tokens/s"), right("a device"), right("MFU"), right("memory"),
    right("gap"), "plan"], rows.map((row) => (row.feasible ? [row.cluster, row.devices, row.global_batch, row.seq_len ?? "-", seconds(row.step_time_s),
    digits(row.tokens_per_s, 4), digits(row.tokens_per_s_per_device, 4), percent(row.mfu), row.memory_share === null ? "-" : percent(row.memory_share, 0),
    row.gap === null ? "-" : percent(row.gap, 2), plan(row)]
    : [row.cluster, row.devices, row.global_batch, row.seq_len ?? "-", "-", "-", "-", "-", "-", "-", row.reason])));
}

const plan = (row) => `${row.stages} stage${row.stages > 1 ? "s" : ""}, ${row.mesh}, ZeRO ${row.zero}, ${row.num_micro_batches} \u00d7 ${row.micro_batch} rows, recompute ${row.recompute}`;
const WIDE = 1000, HIGH = 380, LEFT = 78, BELOW = 46, ABOVE = 34, RIGHT = 240;

// Lines of all points that agree in everything but x; a dashed one shows what x times as many devices would give at best.
function chart(rows, [xKey, xName], [yKey, yName, text], axes) {
  const grows = xKey === "devices" && rows.every((row) => row.scaling === "weak");  // with the devices grows the batch
  const others = axes.filter(([key]) => key !== xKey).map(([key, word]) => (grows && key === "global_batch" ? ["first_batch", "batch grows from"] : [key, word])), several = new Set(rows.map((row) => row.device)).size > 1;
  const known = rows.filter((row) => row.feasible && row[yKey] !== null && row[yKey] !== undefined && row[xKey] !== null);
  if (!known.length) return h("p", { class: "soft" }, "no point has a plan that fits");
  const name = (row) => [...(several && xKey !== "devices" ? [row.cluster] : several ? [row.device] : []),
    ...others.filter(([key]) => !(several && key === "devices" && xKey !== "devices")).map(([key, word]) => `${word.replace("global ", "")} ${row[key]}`)].join(", ");
  const series = new Map();
  for (const row of known) series.set(name(row), [...(series.get(name(row)) ?? []), row]);
  for (const line of series.values()) line.sort((a, b) => a[xKey] - b[xKey]);
  const xs = [...new Set(known.map((row) => row[xKey]))].sort((a, b) => a - b);
  const least = Math.log2(xs[0]), most = Math.log2(xs.at(-1)), top = Math.max(...known.map((row) => row[yKey])) * 1.08 || 1;
  const px = (value) => LEFT + (most > least ? (Math.log2(value) - least) / (most - least) : 0.5) * (WIDE - LEFT - RIGHT);
  const py = (value) => HIGH - BELOW - (value / top) * (HIGH - BELOW - ABOVE);
  const scene = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, width: "100%", role: "img", class: "chart", "aria-label": `${yName} over ${xName}` });
  const rough = top / 5, power = 10 ** Math.floor(Math.log10(rough)), every = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  for (let value = 0; value <= top; value += every) {
    scene.append(svg("line", { x1: LEFT, x2: WIDE - RIGHT + 10, y1: py(value), y2: py(value), class: "grid" }),
      svg("text", { x: LEFT - 8, y: py(value) + 4, "text-anchor": "end" }, text(value)));
  }
  for (const value of xs) scene.append(svg("text", { x: px(value), y: HIGH - BELOW + 20, "text-anchor": "middle" }, digits(value, 6)));
  scene.append(svg("text", { x: (LEFT + WIDE - RIGHT) / 2, y: HIGH - 6, "text-anchor": "middle", class: "sub" }, xName),
    svg("text", { x: 0, y: 14, class: "sub" }, yName));
  const names = [...series.keys()];
  names.forEach((label, i) => {
    const line = series.get(label), hue = `hsl(${(215 + i * 137.508) % 360} 55% var(--mid))`;
    if (xKey === "devices" && yKey === "tokens_per_s" && line.length > 1) {
      const ideal = line.map((row) => [px(row.devices), py(line[0].tokens_per_s * row.devices / line[0].devices)]);
      scene.append(svg("path", { d: path(ideal), class: "ideal", stroke: hue }));
    }
    scene.append(svg("path", { d: path(line.map((row) => [px(row[xKey]), py(row[yKey])])), class: "line", stroke: hue }));
    for (const row of line) {
      scene.append(svg("circle", { cx: px(row[xKey]), cy: py(row[yKey]), r: 4.5, fill: hue, tabindex: "0", "aria-label": `${row.cluster}: ${text(row[yKey])}`,
        onpointermove: (event) => showTip(`${row.cluster}, batch ${row.global_batch}${row.seq_len ? `, sequence ${row.seq_len}` : ""}\n${yName} ${text(row[yKey])}\n${plan(row)}`, event),
        onpointerleave: hideTip }));
    }
    if (label && i < 16) {
      scene.append(svg("circle", { cx: WIDE - RIGHT + 26, cy: ABOVE + 8 + 20 * i, r: 4.5, fill: hue }),
        svg("text", { x: WIDE - RIGHT + 38, y: ABOVE + 12 + 20 * i }, label));
    }
  });
  const missing = rows.length - known.length, ideal = xKey === "devices" && yKey === "tokens_per_s";
  return h("div", {}, scene, h("p", { class: "soft" }, [ideal ? "dashed: in proportion to the devices, from the first point." : "",
    missing ? `${missing} of ${rows.length} points have no plan that fits; the table says why.` : "",
    names.length > 16 ? `${names.length - 16} more lines have no room for their names.` : ""].filter(Boolean).join(" ")));
}

const path = (points) => points.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");
