// Two plans of one model side by side: what the second gains, and what moved, on scales that both share.
import { cluster, clusterTable } from "./cluster.js";
import { h, hideTip, right, section, showTip, table } from "./dom.js";
import { PARTS, bytes, digits, percent, seconds, stageColour } from "./format.js";
import { memory, memoryTable } from "./memory.js";
import { timeline, timelineTable } from "./timeline.js";

export function comparison({ comparison: found, pictures }, themeButton) {
  const [one, other] = found.names, steps = pictures.map((plan) => plan.timeline.step_time_s), longest = Math.max(...steps);
  document.title = `${one} against ${other}`;
  const pair = (make) => h("div", {}, pictures.map((plan, i) => [h("h3", {}, found.names[i]), make(plan, i)]));
  const section2 = (id, title, words, make, makeTable) => section(id, title, words, pair(make), () => pair(makeTable));
  return h("main", {},
    h("header", { class: "top" }, h("div", {}, h("h1", {}, `${one} against ${other}`),
      h("div", { class: "soft" }, `two plans for ${pictures[0].model}; changes are of ${other} against ${one}`)),
    h("div", { class: "tools" }, themeButton)),
    h("section", { id: "gains" }, h("h2", {}, found.gains[0]),
      found.gains.length > 1 ? h("ul", { class: "plain" }, found.gains.slice(1).map((text) => h("li", {}, text))) : null),
    h("div", { class: "tiles" }, found.numbers.map(tile(found.names))),
    breakdown(found, pictures, longest),
    found.settings.length ? tableSection("settings", "Settings that differ", "", ["", one, other], found.settings) : null,
    section("moved", "Where the blocks lie", "each cell is a block of the model, in order, its colour and number its stage",
      strips(found, pictures), () => movedTable(found)),
    section2("cluster", "Clusters", "each square is a device, its colour and number the stage that it runs",
      (plan) => cluster(plan.cluster, plan.stages.length), (plan) => clusterTable(plan.cluster)),
    section2("timeline", "One step in time", "both on one scale",
      (plan, i) => timeline({ ...plan.timeline, step_time_s: longest, end_s: steps[i] }), (plan) => timelineTable(plan.timeline)),
    section2("memory", "Memory", "what a device of each pipeline rank holds at its peak",
      (plan, i) => memory(plan.timeline.rows, steps[i]), (plan) => memoryTable(plan.timeline.rows)),
    found.splits.length ? tableSection("splits", "Ops that are split otherwise", "axis, its size, and the factor that it splits",
      ["block", "module", "op", one, other],
      found.splits.map((row) => [row.cls, row.module, row.op, ...row.values.map((value) => value || "whole")])) : null,
    found.collectives.length ? tableSection("collectives", "Collectives inside one block", "forward and backward of a micro-batch",
      ["block", "collective", "axis", one, other], found.collectives.map((row) => [row.cls, row.collective.replaceAll("_", "-"), row.axis,
        ...row.counts.map((count, i) => (count ? `${count} \u00d7, ${bytes(row.size_bytes[i])}` : "none"))])) : null);
}

function tableSection(id, title, words, columns, rows) {
  return h("section", { id }, h("div", { class: "head" }, h("h2", {}, title), h("p", {}, words)), h("div", { class: "scroll" }, table(columns, rows)));
}

const SHOWN = { seconds, share: (value) => percent(value), rate: (value) => digits(value, 4) };
const shown = (row, value) => (value === null ? "-" : SHOWN[row.kind](value));

function tile(names) {
  return (row) => {
    const [a, b] = row.values, known = a !== null && b !== null;
    const change = !known ? "" : row.kind === "share" ? `${b >= a ? "+" : "\u2212"}${(100 * Math.abs(b - a)).toFixed(1)} points`
      : a ? `${b >= a ? "+" : "\u2212"}${percent(Math.abs(b / a - 1))}` : "";
    const good = known && a !== b && row.better && row.key !== "lower_bound_s" ? ((b < a) === (row.better === "less") ? " good" : " bad") : "";
    return h("div", { class: "tile" }, h("b", {}, shown(row, b)), change ? h("div", { class: `change${good}` }, change) : null,
      h("span", {}, row.name), h("br"), h("span", {}, `${names[0]}: ${shown(row, a)}`));
  };
}

function breakdown(found, pictures, longest) {
  const [one, other] = found.names;
  const bars = pictures.map((plan, i) => h("div", { class: "baseline" }, h("div", {}, found.names[i]),
    h("div", { class: "bar", role: "img", "aria-label": `Parts of the step time of ${found.names[i]}` }, PARTS.map(([key, name, colour]) => h("i", {
      title: `${name} ${seconds(plan.breakdown_s[key])}`, style: { width: `${100 * plan.breakdown_s[key] / longest}%`, background: `var(${colour})` } }))),
    h("div", { class: "num" }, seconds(plan.timeline.step_time_s))));
  const legend = h("div", { class: "legend" }, PARTS.filter(([key]) => found.parts.some((row) => row.part === key)).map(([, name, colour]) =>
    h("span", {}, h("i", { style: { background: `var(${colour})` } }), name)));
  const change = (value) => `${value > 0 ? "+" : value < 0 ? "\u2212" : ""}${seconds(Math.abs(value))}`;
  const rows = () => table(["part", right(one), right(other), right("change")], [
    ...found.parts.map((row) => [row.name, ...row.values.map(seconds), change(row.values[1] - row.values[0])]),
    ["step", ...pictures.map((plan) => seconds(plan.timeline.step_time_s)),
      change(pictures[1].timeline.step_time_s - pictures[0].timeline.step_time_s)]]);
  return section("breakdown", "Where the steps go", "on the busiest device; communication that hides behind compute is left out",
    h("div", {}, bars, legend), rows);
}

function strips(found, pictures) {
  const rows = found.names.map((name, i) => {
    const cells = found.blocks.flatMap((run) => {
      const stage = run.stages[i], many = run.count > 64;
      const words = `${run.first}${run.count > 1 ? ` to ${run.last}` : ""}: stage ${stage}, ranks ${run.ranks[i]}, ${run.meshes[i]}\n`
        + (run.moved ? "other devices in the two plans" : run.reshaped ? "same devices, shared out otherwise" : "same devices, shared out alike");
      const cell = (wide) => h("i", { class: run.moved ? "moved" : "", style: { background: stageColour(stage, pictures[i].stages.length), flex: wide },
        onpointermove: (event) => showTip(words, event), onpointerleave: hideTip }, run.count * found.names.length > 200 ? "" : stage);
      return many ? [cell(run.count)] : Array.from({ length: run.count }, () => cell(1));
    });
    return h("div", { class: "baseline" }, h("div", {}, name), h("div", { class: "strip" }, cells), h("div", { class: "soft" },
      `${pictures[i].stages.length} stage${pictures[i].stages.length > 1 ? "s" : ""}`));
  });
  const moved = found.blocks.reduce((sum, run) => sum + (run.moved ? run.count : 0), 0);
  const all = found.blocks.reduce((sum, run) => sum + run.count, 0);
  return h("div", {}, rows, h("p", { class: "soft" }, `${moved} of ${all} blocks lie on other devices${moved ? " (underlined)" : ""}.`),
    found.ranks.length ? h("p", { class: "soft" }, "Ranks with other stages: ", found.ranks.slice(0, 12).map((row) =>
      `${row.ranks} (${row.stages.map((own) => own.join("+") || "none").join(" \u2192 ")})`).join(", "),
    found.ranks.length > 12 ? ` and ${found.ranks.length - 12} more runs` : "") : null);
}

function movedTable(found) {
  const [one, other] = found.names;
  return table(["blocks", right("how many"), `stage in ${one}`, "ranks", "mesh", `stage in ${other}`, "ranks", "mesh", ""], found.blocks.map((run) => [
    run.count > 1 ? `${run.first} .. ${run.last}` : run.first, run.count, run.stages[0], run.ranks[0], run.meshes[0], run.stages[1], run.ranks[1], run.meshes[1],
    run.moved ? "moved" : run.reshaped ? "shared out otherwise" : "stays"]));
}
