// The stages with their blocks, repeated layers in one line; a block opens into its ops, their splits and collectives.
import dagre from "@dagrejs/dagre";
import { h, right, svg, table } from "./dom.js";
import { bytes, seconds, stageColour } from "./format.js";

const MOST_OPS = 700, WIDE = 176, HIGH = 38;

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
const splitText = (axis) => axis.factor ? `${axis.axis}: splits ${axis.factor}` : `${axis.axis}: whole`;

function block(entry, opName) {
  const aside = h("aside", {}, h("p", { class: "soft" }, "Press an op for its split, its placements and its time."));
  const axes = entry.axes.map(([name, size]) => `${name} ${size}`).join(" \u00d7 ");
  const head = h("h3", {}, `${entry.cls}: ${entry.ops.length} ops`, axes ? `, split over ${axes}` : ", whole on each device",
    entry.collectives.length ? `; ${entry.collectives.length} collectives in forward and backward` : "");
  if (entry.ops.length > MOST_OPS) {
    return h("div", {}, head, h("p", { class: "soft" }, `too many ops to draw; press "table" to read them`));
  }
  return h("div", {}, head, h("div", { class: "pair" }, graph(entry, opName, (op) => details(entry, op, aside)), aside));
}

function graph(entry, opName, onPick) {
  const layout = new dagre.graphlib.Graph({ multigraph: false });
  layout.setGraph({ rankdir: "TB", nodesep: 14, ranksep: 34, marginx: 12, marginy: 12 });
  layout.setDefaultEdgeLabel(() => ({}));
  const comm = new Map();
  for (const item of entry.collectives) comm.set(item.op, [...(comm.get(item.op) ?? []), item]);
  for (const op of entry.ops) layout.setNode(op.name, { width: WIDE, height: HIGH });
  for (const op of entry.ops) for (const from of op.from) layout.setEdge(from, op.name);
  dagre.layout(layout);
  const { width, height } = layout.graph();
  const scene = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Ops of ${entry.cls}` });
  for (const edge of layout.edges()) {
    const own = comm.get(edge.v)?.filter((item) => !item.lowering);
    const points = layout.edge(edge).points;
    const d = points.map((p, i) => `${i ? "L" : "M"}${p.x.toFixed(1)} ${p.y.toFixed(1)}`).join("");
    scene.append(svg("path", { d, class: own?.length ? "comm" : "" }));
    if (own?.length && edge.w === entry.ops.find((op) => op.from.includes(edge.v))?.name) {
      const middle = points[Math.floor(points.length / 2)];
      const names = [...new Set(own.map((item) => `${item.collective.replaceAll("_", "-")} (${item.axis})`))];
      names.forEach((name, i) => scene.append(svg("text", { class: "comm", x: middle.x + 5, y: middle.y - 3 + 12 * i }, name)));
    }
  }
  let chosen = null;
  for (const op of entry.ops) {
    const { x, y } = layout.node(op.name), found = op.name === opName;
    const pick = () => {
      chosen?.classList.remove("chosen");
      chosen = node;
      node.classList.add("chosen");
      onPick(op);
    };
    const node = svg("g", { class: `op${isSplit(op) ? " split" : ""}${found ? " found" : ""}`, tabindex: "0", role: "button",
      "aria-label": `${op.target} of ${op.module || entry.cls}`, transform: `translate(${x - WIDE / 2} ${y - HIGH / 2})`,
      onclick: pick, onkeydown: (event) => event.key === "Enter" && pick() },
    svg("rect", { width: WIDE, height: HIGH }),
    svg("text", { x: 8, y: 15 }, clip(`${op.target}${op.module ? ` \u00b7 ${op.module.split(".").at(-1)}` : ""}`, 26)),
    svg("text", { x: 8, y: 30, class: "sub" }, clip(op.axes.map(splitText).join(" \u00b7 ") || op.shape.join(" \u00d7 "), 31)));
    scene.append(node);
    if (found) pick();
  }
  return h("div", { class: "graph" }, scene);
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
    params.length ? [h("h3", {}, "parameters"), table(["name", "shape", "at rest"], params.map((p) => [p.name, p.shape.join(" \u00d7 "), p.at_rest]))] : [],
    own.length ? [h("h3", {}, "collectives"), table(["what", "when", "bytes", "time"], own.map((item) =>
      [`${item.collective.replaceAll("_", "-")} over ${item.axis}${item.src ? ` (${item.src} \u2192 ${item.dst})` : ""}`,
        item.backward ? "backward" : "forward", bytes(item.size_bytes), seconds(item.time_s)]))] : [],
    op.axes.length ? h("p", { class: "soft" }, "R: whole on every rank; S(d): dim d split over the ranks; P: each rank has a part of a sum; RP: whole, its gradient still to be summed") : null,
  ));
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
