// The stages with their blocks, repeated layers in one line; a block opens into its ops, their splits and collectives.
import dagre from "@dagrejs/dagre";
import { h, right, svg, table } from "./dom.js";
import { bytes, seconds, stageColour } from "./format.js";

const MOST_OPS = 700, WIDE = 196, HIGH = 38;

export function model(plan) {
  const place = h("div", {});

  function show(entry, opName) {
    const open = String(plan.classes.indexOf(entry));
    place.replaceChildren(block(entry, opName));
    for (const button of runs.querySelectorAll("button.run")) button.setAttribute("aria-pressed", String(button.dataset.entry === open));
    if (opName) place.querySelector(".op.found")?.scrollIntoView({ block: "center", inline: "center" });
  }

  const runs = h("div", { class: "stages" }, plan.stages.map((stage) => h("div", {
    class: "stage", style: { "border-top-color": stageColour(stage.index, plan.stages.length) } },
  h("b", {}, `stage ${stage.index}`), " ", h("span", { class: "soft" },
    `${stage.num_devices} \u00d7 ${Object.keys(stage.types).join(", ")}`),
  h("div", { class: "soft" }, `${stage.mesh} \u00b7 ZeRO ${stage.zero}`),
  h("div", { class: "soft" }, `recompute: ${stage.recompute}`),
  stage.blocks.map((run) => h("button", { class: "run", "data-entry": run.entry, "aria-pressed": "false",
    title: `${run.first}${run.count > 1 ? ` to ${run.last}` : ""}: show its ops`, onclick: () => show(plan.classes[run.entry]) },
  h("span", {}, run.count > 1 ? `${run.count} \u00d7 ${run.cls}` : run.first),
  h("span", { class: "soft" }, run.count > 1 ? `${run.first.split(".").at(-1)}\u2013${run.last.split(".").at(-1)}` : ""))))));
  return { drawing: h("div", {}, runs, place), show };
}

const isSplit = (op) => op.axes.some((axis) => axis.factor);
const splitText = (axis) => axis.factor ? `${axis.axis}: splits ${axis.factor} \u2192 ${axis.outputs[0] ?? ""}` : `${axis.axis}: whole`;

function block(entry, opName) {
  const aside = h("aside", {}, h("p", { class: "soft" }, "Press an op for its split, its placements and its time."));
  const axes = entry.axes.map(([name, size]) => `${name} ${size}`).join(" \u00d7 ");
  const head = h("h3", {}, `${entry.cls}: ${entry.ops.length} ops`, axes ? `, split over ${axes}` : ", whole on each device",
    entry.collectives.length ? `; ${entry.collectives.length} collectives in forward and backward` : "");
  if (entry.ops.length > MOST_OPS) {
    return h("div", {}, head, h("p", { class: "soft" }, `too many ops to draw; press "table" to read them`));
  }
  return h("div", {}, head, h("div", { class: "pair" }, graph(entry, opName, (op) => details(entry, op, aside)), aside),
    entry.axes.length ? h("p", { class: "soft" }, "On an edge: how its tensor lies, and the collective that changes it, once for all who read it (\u2193 forward, \u2191 backward). R: whole on every rank; S(d): dim d split "
      + "over the ranks; P: each rank has a part of a sum; RP: whole, its gradient still to be summed.") : null);
}

const CHAR = 5.9;  // of the labels, in pixels

// Ops and what the block reads, in layers; an edge says how its tensor lies and which collectives turn it round.
function graph(entry, opName, onPick) {
  const names = new Set(entry.ops.map((op) => op.name)), comm = new Map();
  for (const item of entry.collectives) if (!item.lowering) comm.set(item.op, [...(comm.get(item.op) ?? []), item]);
  const inside = new Map();
  for (const item of entry.collectives) if (item.lowering) inside.set(item.op, new Set([...(inside.get(item.op) ?? []), spell(item)]));
  const lines = (op) => (entry.axes.length ? [...op.axes.map(splitText), ...(inside.get(op.name) ?? [])] : [op.shape.join(" \u00d7 ") || "a number"]);
  const layout = new dagre.graphlib.Graph({ multigraph: false });
  layout.setGraph({ rankdir: "TB", nodesep: 14, ranksep: 30, marginx: 12, marginy: 12 });
  for (const op of entry.ops) layout.setNode(op.name, { width: WIDE, height: HIGH + 13 * (lines(op).length - 1) });
  for (const op of entry.ops) {
    for (const from of op.from) layout.setEdge(from, op.name, edgeLabel(entry, entry.ops.find((one) => one.name === from), comm.get(from)));
    for (const name of op.reads) {
      const input = `reads ${name}`;
      if (!layout.hasNode(input)) layout.setNode(input, { width: 160, height: 24, input: name });
      layout.setEdge(input, op.name, edgeLabel(entry, null, names.has(name) ? null : comm.get(name)));
    }
  }
  dagre.layout(layout);
  const { width, height } = layout.graph();
  const scene = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Ops of ${entry.cls}` });
  for (const edge of layout.edges()) {
    const { points, x, y, labels } = layout.edge(edge), turned = labels.some((label) => label.comm);
    scene.append(svg("path", { d: curve(points), class: turned ? "comm" : "" }));
    labels.forEach((label, i) => scene.append(svg("text", { class: label.comm ? "comm" : "sub", x: x - 0.5 * Math.max(...labels.map((one) => one.text.length)) * CHAR + 4,
      y: y + 4 + 12 * (i - (labels.length - 1) / 2) }, label.text)));
  }
  for (const name of layout.nodes()) {
    const { x, y, input } = layout.node(name);
    if (input) scene.append(svg("g", { class: "input", transform: `translate(${x} ${y})` }, svg("title", {}, `${input}: read from the blocks before`),
      svg("rect", { x: -80, y: -12, width: 160, height: 24 }), svg("text", { y: 4, "text-anchor": "middle", class: "sub" }, clip(`reads ${input}`, 27))));
  }
  let chosen = null;
  for (const op of entry.ops) {
    const { x, y, height: high } = layout.node(op.name), found = op.name === opName;
    const pick = () => {
      chosen?.classList.remove("chosen");
      chosen = node;
      node.classList.add("chosen");
      onPick(op);
    };
    const node = svg("g", { class: `op${isSplit(op) ? " split" : ""}${found ? " found" : ""}`, tabindex: "0", role: "button",
      "aria-label": `${op.target} of ${op.module || entry.cls}`, transform: `translate(${x - WIDE / 2} ${y - high / 2})`,
      onclick: pick, onkeydown: (event) => event.key === "Enter" && pick() },
    svg("title", {}, `${op.target} of ${op.module || entry.cls}`),
    svg("rect", { width: WIDE, height: high }),
    svg("text", { x: 8, y: 15 }, clip(`${op.target}${op.module ? ` \u00b7 ${op.module.split(".").at(-1)}` : ""}`, 28)),
    lines(op).map((line, i) => svg("text", { x: 8, y: 30 + 13 * i, class: "sub" }, clip(line, 33))));
    scene.append(node);
    if (found) pick();
  }
  return zoomable(scene, width, height, layout.node(opName ?? entry.ops[0]?.name));
}

// A graph in a frame of its own: first as wide as the frame lets it be read, then at the buttons' scale.
function zoomable(scene, width, height, focus) {
  const frame = h("div", { class: "graph" }, scene);
  let scale = 1;
  const fitting = () => Math.min(1, (frame.clientWidth - 2) / width);
  const set = (value) => {
    const middle = [(frame.scrollLeft + frame.clientWidth / 2) / scale, (frame.scrollTop + frame.clientHeight / 2) / scale];
    scale = Math.max(0.2, Math.min(value, 2));
    scene.setAttribute("width", width * scale);
    scene.setAttribute("height", height * scale);
    frame.scrollTo(middle[0] * scale - frame.clientWidth / 2, middle[1] * scale - frame.clientHeight / 2);
  };
  requestAnimationFrame(() => {
    set(Math.max(fitting(), 0.9));
    if (focus) frame.scrollTo(focus.x * scale - frame.clientWidth / 2, focus.y * scale - frame.clientHeight / 3);
  });
  return h("div", { class: "framed" }, frame, h("div", { class: "zoom" },
    h("button", { "aria-label": "larger", onclick: () => set(scale * 1.25) }, "+"),
    h("button", { "aria-label": "smaller", onclick: () => set(scale / 1.25) }, "\u2212"),
    h("button", { onclick: () => set(fitting()) }, "fit")));
}

const spell = (item) => `${item.collective.replaceAll("_", "-")} over ${item.axis} inside`;

// How the tensor that `op` makes (null: one from before) lies on the axes, then what is done to it on its way.
function edgeLabel(entry, op, items) {
  const labels = [];
  const places = [...new Set((items ?? []).map((item) => item.src))];
  const made = op ? op.axes.map((axis) => axis.outputs[0] ?? "").join(", ") : places.join(", ");
  if (entry.axes.length && made) labels.push({ text: made });
  for (const [backward, arrow] of [[false, "\u2193"], [true, "\u2191"]]) {
    const own = (items ?? []).filter((item) => item.backward === backward);
    for (const text of new Set(own.map((item) => `${arrow} ${item.collective.replaceAll("_", "-")}${entry.axes.length > 1 ? ` ${item.axis}` : ""}${backward ? "" : ` \u2192 ${item.dst}`}`))) {
      labels.push({ text, comm: true });
    }
  }
  if (!labels.length) return { labels, minlen: 1 };
  return { labels, width: Math.max(...labels.map((label) => label.text.length)) * CHAR, height: 12 * labels.length, labelpos: "c" };
}

// Through dagre's points, with the corners rounded.
function curve(points) {
  const at = (p) => `${p.x.toFixed(1)} ${p.y.toFixed(1)}`, last = points.at(-1);
  const between = (a, b) => ({ x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 });
  return `M${at(points[0])}${points.slice(1, -1).map((p, i) => `Q${at(p)} ${at(i + 3 < points.length ? between(p, points[i + 2]) : last)}`).join("")}${points.length < 3 ? `L${at(last)}` : ""}`;
}

// What a factor, a loop dimension of the op, is of its result.
function factorWords(entry, op, axis) {
  const [, size] = entry.axes.find(([name]) => name === axis.axis), dim = /^S\((\d+)/.exec(axis.outputs[0] ?? "")?.[1];
  const what = dim !== undefined && op.shape[dim] !== undefined ? `, dim ${dim} of the result, ${op.shape[dim]} long` : "";
  return `${axis.axis} ${size}: ${axis.words} (factor ${axis.factor}${what})`;
}

const clip = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}\u2026` : text);

function details(entry, op, aside) {
  const params = entry.params.filter((param) => op.params.includes(param.local));
  const own = entry.collectives.filter((item) => item.op === op.name || op.reads.includes(item.subject) || op.params.includes(item.subject));
  aside.replaceChildren(h("div", {},
    h("b", {}, op.target), h("div", { class: "soft" }, op.module || entry.cls, op.source ? ` \u00b7 ${op.source}` : ""),
    h("p", {}, `result ${op.shape.join(" \u00d7 ") || "a number"} in a micro-batch \u00b7 forward ${seconds(op.forward_s)}, backward ${seconds(op.backward_s)}`),
    op.axes.length ? table(["axis", "split", "inputs", "outputs"], op.axes.map((axis) =>
      [axis.axis, axis.factor || "whole", axis.inputs.join(", "), axis.outputs.join(", ") + (axis.lowering ? ` (${axis.lowering.replaceAll("_", " ")})` : "")]))
      : h("p", { class: "soft" }, "not split: each device runs it on its own rows"),
    params.length ? [h("h3", {}, "parameters"), table(["name", "shape", "at rest"], params.map((p) => [p.local, p.shape.join("\u00d7"), p.at_rest]))] : [],
    own.length ? [h("h3", {}, "collectives"), table(["what", "when", "bytes", "time"], own.map((item) =>
      [`${item.collective.replaceAll("_", "-")} over ${item.axis}${item.src ? ` (${item.src} \u2192 ${item.dst})` : ""}`,
        item.backward ? "backward" : "forward", bytes(item.size_bytes), seconds(item.time_s)]))] : [],
    op.axes.some((axis) => axis.factor) ? h("p", {}, op.axes.filter((axis) => axis.factor).map((axis) => `${factorWords(entry, op, axis)}. `)) : null));
}

export function modelTable(plan) {
  const rows = plan.classes.flatMap((entry) => entry.ops.map((op) => [entry.cls, op.module, op.target, op.shape.join(" x "),
    op.axes.map(splitText).join("; ") || "whole", op.axes.map((a) => `${a.inputs.join(", ")} -> ${a.outputs.join(", ")}`).join("; "),
    entry.collectives.filter((item) => item.op === op.name).map((item) =>
      `${item.collective} ${item.axis} ${item.backward ? "backward" : "forward"} ${bytes(item.size_bytes)}`).join("; "),
    seconds(op.forward_s), seconds(op.backward_s)]));
  return table(["block", "module", "op", "result", "split", "placements", "collectives", right("forward"), right("backward")], rows);
}

export function searchOps(plan, text) {
  const wanted = text.toLowerCase(), hits = [];
  for (const entry of plan.classes) {
    const names = plan.stages.flatMap((stage) => stage.blocks.filter((run) => plan.classes[run.entry] === entry));
    for (const op of entry.ops) {
      const params = entry.params.filter((param) => op.params.includes(param.local)).map((param) => param.name);
      const full = `${op.module} ${op.target} ${params.join(" ")} ${names.map((run) => `${run.first} ${run.last}`).join(" ")}`;
      if (`${full} ${entry.cls}`.toLowerCase().includes(wanted)) {
        hits.push({ entry, op, text: `${entry.cls} \u203a ${op.module || op.target}`, more: op.target, close: op.module.toLowerCase().includes(wanted) });
      }
    }
  }
  hits.sort((a, b) => Number(b.close) - Number(a.close));
  return hits;
}
