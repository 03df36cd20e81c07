// Numbers as people read them.
export function seconds(value) {
  if (value === null || value === undefined) return "-";
  for (const [unit, scale] of [["s", 1], ["ms", 1e-3], ["\u00b5s", 1e-6]]) {
    if (Math.abs(value) >= scale) return `${digits(value / scale)} ${unit}`;
  }
  return value === 0 ? "0 s" : `${digits(value * 1e9)} ns`;
}

export function digits(value, count = 4) {
  return Number(value.toPrecision(count)).toLocaleString("en", { maximumFractionDigits: 6 });
}

export const percent = (value, places = 1) => `${(100 * value).toFixed(places)}%`;
export const gib = (value) => (value > 0 && value < 0.1 ? `${digits(value * 1024, 3)} MiB` : `${digits(value, 3)} GiB`);

export function bytes(value) {
  for (const [unit, scale] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (value >= scale) return `${digits(value / scale, 3)} ${unit}`;
  }
  return `${digits(value, 3)} B`;
}

// Stages beside each other differ in hue; thirty-two stages still differ from their neighbours.
export function stageColour(index, count) {
  const dark = document.documentElement.dataset.theme === "dark";
  const hue = count <= 8 ? (215 + index * 360 / Math.max(count, 3)) % 360 : (215 + index * 137.508) % 360;
  return `hsl(${hue.toFixed(1)} ${dark ? 45 : 52}% ${dark ? 46 : 45}%)`;
}

export const KIND = {
  F: ["forward", "--forward"], B: ["backward", "--backward"], I: ["backward of inputs", "--input"],
  W: ["backward of weights", "--weight"], gather: ["gather parameters", "--comm"], reduce: ["reduce gradients", "--comm"],
  optimizer: ["optimizer", "--optimizer"], SEND_F: ["send activations", "--send"], SEND_B: ["send gradients", "--send"],
  WAIT_F: ["wait for activations", "--wait"], WAIT_B: ["wait for gradients", "--wait"],
  UNSHARD: ["gather parameters", "--comm"], REDUCE_GRAD: ["reduce gradients", "--comm"],
};
export const COMMUNICATION = new Set(["gather", "reduce", "SEND_F", "SEND_B", "UNSHARD", "REDUCE_GRAD"]);
export const kindName = (kind) => (KIND[kind] ?? [kind])[0];
export const kindColour = (kind) => (KIND[kind] ?? [kind, "--optimizer"])[1];

// The parts of a step: key, name, colour.
export const PARTS = [["compute", "compute", "--forward"], ["tp_comm", "inside layers", "--comm"], ["dp_comm", "data parallel", "--weight"],
  ["pp_comm", "between stages", "--send"], ["bubble", "bubble", "--bubble"], ["optimizer", "optimizer", "--optimizer"]];
