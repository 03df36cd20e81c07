// Bundles the page into ../assets: page.html's script and style in one file each, and the licences of what is in them.
import { build } from "esbuild";
import { readFileSync, writeFileSync } from "node:fs";

const out = new URL("../assets/", import.meta.url).pathname;

await build({
  entryPoints: ["src/main.js"], bundle: true, minify: true, format: "iife", target: "es2020", charset: "ascii",
  outfile: `${out}page.js`, legalComments: "none",
});
await build({ entryPoints: ["src/page.css"], minify: true, outfile: `${out}page.css`, legalComments: "none" });

const licences = ["@dagrejs/dagre", "@dagrejs/graphlib"].map((name) => {
  const { version, license } = JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf8"));
  return `${name} ${version} (${license})\n\n${readFileSync(`node_modules/${name}/LICENSE`, "utf8").trim()}\n`;
});
writeFileSync(`${out}LICENSES.txt`, `The page contains these libraries.\n\n${licences.join("\n\n")}`);
