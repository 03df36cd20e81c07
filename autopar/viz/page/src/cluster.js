// Nodes as boxes, devices coloured by their stage; nodes that are alike and do the same are one box.
import { h, hideTip, right, showTip, table } from "./dom.js";
import { digits, stageColour } from "./format.js";

const MOST_BOXES = 48;
const rate = (link) => `${link.name} ${digits(link.gb_per_s, 3)} GB/s`;

export function cluster(data, numStages) {
  const shown = data.nodes.slice(0, MOST_BOXES), left = data.nodes.length - shown.length;
  const boxes = h("div", { class: "nodes" }, shown.map((node) => box(node, data.types[node.device], numStages)));
  const types = Object.entries(data.types).map(([name, type]) => h("span", {},
    `${name}: ${digits(type.memory_gib, 3)} GiB at ${digits(type.memory_gb_per_s, 3)} GB/s, `
    + Object.entries(type.peak_tflops).map(([dtype, peak]) => `${dtype} ${digits(peak, 3)}`).join(", ") + " TFLOP/s"));
  return h("div", {}, boxes,
    left > 0 ? h("p", { class: "soft" }, `and ${left} more kinds of nodes; the table has them all`) : null,
    h("div", { class: "legend" }, types));
}

function box(node, type, numStages) {
  const devices = node.stages.map((stages, i) => {
    const words = stages.length ? `stage ${stages.join(", ")}` : "not used by the plan";
    return h("span", {
      class: stages.length ? "device" : "device idle", tabindex: "0", "aria-label": words,
      style: stages.length ? { background: stageColour(stages[0], numStages) } : {},
      onpointermove: (event) => showTip(`${node.device}, ${node.count > 1 ? "device" : "rank"} `
        + `${node.count > 1 ? `${i} of its node` : node.first_rank + i}\n${words}`, event),
      onpointerleave: hideTip,
    }, stages.length ? stages[0] : "-");
  });
  return h("div", { class: node.count > 1 ? "node many" : "node" },
    h("b", {}, node.count > 1 ? `${node.count} nodes` : "1 node"), h("span", { class: "soft" },
      ` of ${node.stages.length} \u00d7 ${node.device}, from rank ${node.first_rank}`),
    h("div", { class: "devices" }, devices),
    h("div", { class: "link" }, `between its devices: ${rate(node.link)} each`),
    h("div", { class: "link" }, `to other nodes: ${rate(node.network)} a node`));
}

export function clusterTable(data) {
  return table(["nodes", "from rank", "devices", "stages", "inside", "network", right("latency \u00b5s")],
    data.nodes.map((node) => [node.count, node.first_rank, `${node.stages.length} x ${node.device}`,
      node.stages.map((stages) => stages.join("+") || "-").join(" "), rate(node.link), rate(node.network),
      digits(node.network.latency_us, 3)]));
}
