// Formulas to HTML: one JSON request a line on standard input, one JSON answer a line on standard output.
//   node formulas.cjs path/to/katex.min.js      {"tex": "x^2", "display": false} -> {"html": "..."} or {"error": "..."}
"use strict";
const katex = require(process.argv[2]);
require("readline").createInterface({ input: process.stdin }).on("line", (line) => {
  const { tex, display } = JSON.parse(line);
  let answer;
  try {
    answer = { html: katex.renderToString(tex, { displayMode: display, throwOnError: true, strict: "ignore" }) };
  } catch (error) {
    answer = { error: error.message };
  }
  process.stdout.write(JSON.stringify(answer) + "\n");
});
