// The front end of widgets.PatternExplorer. It draws what Python computed and computes nothing itself but ranks and
// counts of the weight that is drawn, so it works on a page without a kernel. It knows no structure: what a structure
// is called, how its tiles lie and why a weight went are in `data`.

const SVG = "http://www.w3.org/2000/svg";
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const times = (gain) => (gain === null ? "–" : `${gain.toFixed(gain < 10 ? 2 : 1)}×`);
const megabytes = (bits, size) => `${((bits * size) / 8e6).toFixed(1)} MB`;
const signed = (value) => value.toFixed(3).replace("-", "−");

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function draw(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function octets(value) {
  return value instanceof DataView ? value : new DataView(value.buffer || value, value.byteOffset || 0, value.byteLength);
}

// What the model holds, unpacked: configurations, masks and weights, and small lookups over them.
function read(model) {
  const data = model.get("data");
  const [rows, cols] = data.shape;
  const size = rows * cols;
  const bits = octets(model.get("masks"));
  const floats = octets(model.get("values"));
  const stride = Math.ceil(size / 8);
  const weights = data.kinds.map((_, kind) => Float32Array.from({ length: size }, (_, i) => floats.getFloat32(4 * (kind * size + i), true)));
  const ranks = weights.map((weight) => {
    const order = Array.from(weight.keys()).sort((a, b) => Math.abs(weight[b]) - Math.abs(weight[a]));
    const rank = new Int32Array(size);
    order.forEach((place, number) => { rank[place] = number + 1; });
    return rank; // 1 = the largest magnitude
  });
  const masks = new Map();
  function mask(index, kind) {
    const number = index * data.kinds.length + kind;
    if (!masks.has(number)) {
      masks.set(number, Uint8Array.from({ length: size }, (_, i) => (bits.getUint8(number * stride + (i >> 3)) >> (i & 7)) & 1));
    }
    return masks.get(number);
  }
  const levels = octets(model.get("levels"));
  // How strongly each entry of an approximation is drawn, 0 to 1; null for a structure that keeps weights as they are.
  function near(index, kind) {
    const place = data.configs[index].near;
    if (place === null) return null;
    return Float32Array.from({ length: size }, (_, i) => levels.getUint8((place * data.kinds.length + kind) * size + i) / 255);
  }
  const curve = (number) => (number === null ? null : data.curves[number]);
  return { data, rows, cols, size, weights, ranks, mask, near, curve };
}

// The places that the words of a structure may name, for the weight at one row and column.
function places(source, index, kind, row, col) {
  const { rows, cols, size, weights, ranks } = source;
  const [height, width] = source.data.configs[index].tile;
  const tall = height === 1 && width === 1 ? rows : height;
  const wide = height === 1 && width === 1 ? cols : width;
  const kept = source.mask(index, kind);
  const [top, left] = [row - (row % tall), col - (col % wide)];
  const counts = { kept: 0, row_kept: 0, cols_kept: 0, rank_row: 1, rank_cols: 1 };
  const alive = new Array(wide).fill(false);
  for (let i = top; i < top + tall; i++) {
    for (let j = left; j < left + wide; j++) {
      if (!kept[i * cols + j]) continue;
      counts.kept += 1;
      alive[j - left] = true;
      if (i === row) counts.row_kept += 1;
    }
  }
  const here = ranks[kind][row * cols + col];
  for (let j = left; j < left + wide; j++) {
    const larger = ranks[kind][row * cols + j] < here;
    if (larger) counts.rank_row += 1;
    if (larger && alive[j - left]) counts.rank_cols += 1;
  }
  counts.cols_kept = alive.filter(Boolean).length;
  return {
    ...counts, row, col, rows: tall, cols: wide, size: tall * wide, tile_row: top / tall, tile_col: left / wide,
    rank_all: here, kept_all: kept.reduce((sum, bit) => sum + bit, 0), total: size, is_kept: kept[row * cols + col] === 1,
    column_lives: alive[col - left], ...tileRank(source, kept, weights[kind], tall, wide, top, left), top, left,
  };
}

function tileRank({ rows, cols }, kept, weight, tall, wide, top, left) {
  const across = cols / wide;
  const sums = new Float64Array((rows / tall) * across);
  const live = new Uint8Array(sums.length);
  for (let i = 0; i < rows * cols; i++) {
    const tile = Math.floor(Math.floor(i / cols) / tall) * across + Math.floor((i % cols) / wide);
    sums[tile] += Math.abs(weight[i]);
    live[tile] |= kept[i];
  }
  const here = sums[(top / tall) * across + left / wide];
  return {
    tiles: sums.length, tiles_kept: live.reduce((sum, bit) => sum + bit, 0),
    rank_tile: 1 + sums.reduce((sum, other) => sum + (other > here ? 1 : 0), 0),
  };
}

function explain(source, index, place) {
  const [, , kept, column, pruned] = source.data.configs[index].words.map((number) => source.data.notes[number]);
  const words = place.is_kept ? kept : column && !place.column_lives ? column : pruned;
  return words.replace(/\{(\w+)\}/g, (_, name) => place[name]);
}

// The configuration of a family that has one parameter at a given step and the others nearest to where they were.
function nearest(configs, family, at, field) {
  const members = configs.map((config, index) => ({ config, index })).filter(({ config }) => config.family === family);
  const distance = ({ config }) => config.at.reduce((sum, step, i) => sum + (i === field ? 1000 : 1) * Math.abs(step - at[i]), 0);
  return members.reduce((best, member) => (distance(member) < distance(best) ? member : best)).index;
}

// The configuration of another family whose density is nearest, and of those the one most like the family's default.
function alike({ configs, families }, family, density, kind) {
  const { start } = families[family];
  const far = ({ at, kept }) => 1e6 * Math.round(1e3 * Math.abs(kept[kind][0] - density)) + at.reduce((sum, step, i) => sum + Math.abs(step - start[i]), 0);
  const members = [...configs.keys()].filter((index) => configs[index].family === family);
  return members.reduce((best, index) => (far(configs[index]) < far(configs[best]) ? index : best));
}

function makeControls(source, get, set) {
  const { families, configs, kinds } = source.data;
  const about = make("p", { class: "se-about" });
  const moved = make("p", { class: "se-moved" });
  const sliders = make("div", { class: "se-sliders", role: "group", "aria-label": "parameters of the structure" });
  const family = make("select", { class: "se-family", "aria-label": "structure" }, ...families.map(({ name }, i) => make("option", { value: i }, name)));
  const weight = make("select", { class: "se-kind", "aria-label": "weight" }, ...kinds.map((name, i) => make("option", { value: i }, name)));
  const label = (text, control) => make("label", { class: "se-field" }, make("span", {}, text), control);
  let shown = -1;
  let inputs = [];

  family.addEventListener("input", () => {
    moved.textContent = "";
    set({ index: alike(source.data, Number(family.value), configs[get("index")].kept[get("kind")][0], get("kind")) });
  });
  weight.addEventListener("input", () => set({ kind: Number(weight.value) }));

  function slide(field) {
    const before = configs[get("index")].at;
    const at = before.map((step, i) => (i === field ? Number(inputs[i].input.value) : step));
    const index = nearest(configs, configs[get("index")].family, at, field);
    const { fields } = families[configs[index].family];
    const others = fields.filter((_, i) => i !== field && configs[index].at[i] !== before[i]);
    const said = others.map(({ name, values }) => `${name} to ${values[configs[index].at[fields.findIndex((f) => f.name === name)]]}`);
    moved.textContent = said.length ? `Also moved ${said.join(" and ")}: the nearest that fits.` : "";
    set({ index });
  }

  function build(number) {
    shown = number;
    inputs = families[number].fields.map(({ name, values }, i) => {
      const output = make("output", {});
      const input = make("input", { type: "range", min: 0, max: values.length - 1, step: 1, "data-field": name, "aria-label": name });
      const marked = values.length > 6 ? [values[0], values[values.length - 1]] : values;
      const ends = make("span", { class: "se-ends", "aria-hidden": "true" }, ...marked.map((text) => make("span", {}, text)));
      input.addEventListener("input", () => slide(i));
      const node = make("label", { class: "se-slider" }, make("span", {}, name, " ", output));
      if (values.length > 1) node.append(input, ends);
      return { node, input, output };
    });
    sliders.replaceChildren(...inputs.map(({ node }) => node));
  }

  function update() {
    const config = configs[get("index")];
    if (shown !== config.family) build(config.family);
    family.value = String(config.family);
    weight.value = String(get("kind"));
    about.textContent = families[config.family].about;
    inputs.forEach(({ input, output }, i) => {
      const text = families[config.family].fields[i].values[config.at[i]];
      input.value = String(config.at[i]);
      input.setAttribute("aria-valuetext", text);
      output.textContent = text;
    });
  }
  const choices = make("div", { class: "se-choices" }, label("structure", family), label("weight", weight));
  const node = make("div", { class: "se-controls" }, choices, about, sliders, moved);
  return { node, update };
}

function makeMask(source, get) {
  const { rows, cols, size } = source;
  const canvas = make("canvas", { class: "se-canvas", tabindex: "0", role: "application", "aria-roledescription": "mask" });
  const tip = make("div", { class: "se-tip", role: "status", hidden: "" });
  const probes = ["ink", "line", "mark"].map((name) => make("i", { class: `se-probe se-probe-${name}`, "aria-hidden": "true" }));
  const name = make("output", { class: "se-name" });
  const title = make("p", { class: "se-title" }, name, ` on a ${rows} × ${cols} weight: the stronger the colour, the larger |w|`);
  const hint = make("p", { class: "se-hint" }, "Point, tap or use the arrow keys on the mask: each weight says why it stayed or went.");
  let cell = null;

  function paint() {
    const side = Math.max(1, Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)));
    canvas.width = side;
    canvas.height = Math.round((side * rows) / cols);
    const pen = canvas.getContext("2d");
    const [ink, line, mark] = probes.map((probe) => getComputedStyle(probe).color);
    const x = (col) => Math.round((col * canvas.width) / cols);
    const y = (row) => Math.round((row * canvas.height) / rows);
    const index = get("index");
    const kept = source.mask(index, get("kind"));
    const rank = source.ranks[get("kind")];
    const near = source.near(index, get("kind"));
    pen.fillStyle = ink;
    for (let i = 0; i < size; i++) {
      if (!kept[i]) continue;
      const [row, col] = [Math.floor(i / cols), i % cols];
      // by rank, so that one outlier does not bleach the rest
      pen.globalAlpha = near ? near[i] : 1 - (0.75 * (rank[i] - 1)) / size;
      pen.fillRect(x(col), y(row), x(col + 1) - x(col), y(row + 1) - y(row));
    }
    pen.globalAlpha = 1;
    const [tall, wide] = source.data.configs[index].tile;
    pen.fillStyle = line;
    for (let col = wide; wide > 1 && col < cols; col += wide) pen.fillRect(x(col), 0, 1, canvas.height);
    for (let row = tall; tall > 1 && row < rows; row += tall) pen.fillRect(0, y(row), canvas.width, 1);
    if (cell) outline(pen, x, y, mark, tall, wide);
  }

  function outline(pen, x, y, mark, tall, wide) {
    const box = (top, left, height, width) =>
      pen.strokeRect(x(left), y(top), x(left + width) - x(left), y(top + height) - y(top));
    pen.strokeStyle = mark;
    pen.lineWidth = Math.max(2, 2 * (window.devicePixelRatio || 1));
    if (tall * wide > 1) box(cell.row - (cell.row % tall), cell.col - (cell.col % wide), tall, wide);
    pen.lineWidth /= 2;
    box(cell.row, cell.col, 1, 1);
  }

  function tell() {
    tip.hidden = !cell;
    if (!cell) return;
    const { row, col } = cell;
    const place = places(source, get("index"), get("kind"), row, col);
    const value = source.weights[get("kind")][row * cols + col];
    tip.replaceChildren(
      make("b", {}, `row ${row}, column ${col}: ${signed(value)}, ${source.near(get("index"), get("kind")) ? "approximated" : place.is_kept ? "kept" : "pruned"}`),
      make("span", {}, explain(source, get("index"), place)),
    );
    const unit = canvas.clientWidth / cols;
    const left = Math.min((col + 2) * unit, canvas.clientWidth - tip.offsetWidth);
    const below = (row + 2) * unit;
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${below + tip.offsetHeight < canvas.clientHeight ? below : Math.max(0, (row - 1) * unit - tip.offsetHeight)}px`;
  }

  function move(next) {
    if ((next && next.row) === (cell && cell.row) && (next && next.col) === (cell && cell.col)) return;
    cell = next;
    paint();
    tell();
  }

  function at(event) {
    const box = canvas.getBoundingClientRect();
    const clamp = (value, most) => Math.min(most - 1, Math.max(0, Math.floor(value)));
    move({ row: clamp(((event.clientY - box.top) / box.height) * rows, rows), col: clamp(((event.clientX - box.left) / box.width) * cols, cols) });
  }

  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  canvas.addEventListener("pointermove", at);
  canvas.addEventListener("pointerdown", at);
  canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") move(null); });
  canvas.addEventListener("blur", () => move(null));
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return move(null);
    const step = steps[event.key];
    if (!step) return undefined;
    event.preventDefault();
    event.stopPropagation(); // JupyterLab and the book turn cells and pages with the arrow keys
    const from = cell || { row: -step[0], col: -step[1] };
    return move({ row: (from.row + step[0] + rows) % rows, col: (from.col + step[1] + cols) % cols });
  });

  function update() {
    const kept = source.mask(get("index"), get("kind")).reduce((sum, bit) => sum + bit, 0);
    name.textContent = source.data.configs[get("index")].name;
    canvas.setAttribute("aria-label", `${name.textContent} on a ${rows} by ${cols} weight: ${kept} of ${size} kept. Arrow keys read single weights.`);
    paint();
    tell();
  }
  const node = make("div", { class: "se-mask" }, title, make("div", { class: "se-frame" }, canvas, tip, ...probes), hint);
  return { node, canvas, update, paint };
}

function card(title, ...children) {
  return make("section", { class: "se-card", "aria-label": title }, make("h4", {}, title), ...children);
}

function bar(name) {
  const fill = make("i", { class: "se-fill" });
  const mark = make("i", { class: "se-mark", hidden: "" });
  const value = make("output", { class: `se-value se-${name}` });
  const note = make("small", {});
  const node = make("div", { class: "se-bar" }, make("span", {}, name), make("div", { class: "se-track", "aria-hidden": "true" }, fill, mark), value, note);
  function show(share, best, words) {
    fill.style.width = `${100 * share}%`;
    mark.hidden = best === null;
    if (best !== null) mark.style.left = `${100 * best}%`;
    value.textContent = percent(share);
    note.textContent = words;
  }
  return { node, show };
}

function makeKept(source, get) {
  const [density, magnitude, energy] = ["density", "magnitude", "energy"].map(bar);
  function update() {
    const [share, size, square, bestSize, bestSquare] = source.data.configs[get("index")].kept[get("kind")];
    density.show(share, null, `${Math.round(share * source.size)} of ${source.size} weights`);
    magnitude.show(size, bestSize, `${percent(size / bestSize)} of the best`);
    energy.show(square, bestSquare, `${percent(square / bestSquare)} of the best`);
  }
  const key = make("p", { class: "se-key" }, make("i", { class: "se-mark-key" }), " the best choice at this density if any weight could be kept. ",
    "Magnitude is Σ|w|, energy Σw².");
  return { node: card("What it keeps", density.node, magnitude.node, energy.node, key), update };
}

function makeBytes(source, get) {
  const { configs, matrix } = source.data;
  const dense = 16;
  const most = Math.max(dense, ...configs.map(({ bits }) => bits[0] + bits[1]));
  const values = make("i", { class: "se-fill" });
  const index = make("i", { class: "se-fill se-index" });
  const mark = make("i", { class: "se-mark", style: `left: ${(100 * dense) / most}%` });
  const total = make("output", { class: "se-big se-bits" });
  const parts = make("p", { class: "se-parts" });
  const least = make("p", { class: "se-least" });
  function update() {
    const [first, second, positions] = configs[get("index")].bits;
    const size = matrix[0] * matrix[1];
    values.style.width = `${(100 * first) / most}%`;
    index.style.width = `${(100 * second) / most}%`;
    total.textContent = `${(first + second).toFixed(2)} bits a weight`;
    const fine = (number) => number.toFixed(number < 0.1 && number > 0 ? 3 : 2);
    parts.textContent = `${fine(first)} values + ${fine(second)} index; dense has ${fine(dense)}. ` +
      `${megabytes(first + second, size)} of ${megabytes(dense, size)}: ${percent((first + second) / dense)}.`;
    least.textContent = positions ? `Any code of the positions needs at least ${fine(positions)} bits a weight on average.` : "";
  }
  const track = make("div", { class: "se-track se-wide", "aria-hidden": "true" }, values, index, mark);
  const key = make("p", { class: "se-key" }, make("i", { class: "se-swatch" }), " values ", make("i", { class: "se-swatch se-index" }), " index ",
    make("i", { class: "se-mark-key" }), " dense");
  return { node: card(`Its bytes, for [${matrix[0]} × ${matrix[1]}] in bf16`, total, track, key, parts, least), update };
}

const PLOT = { width: 340, height: 168, left: 34, right: 20, top: 8, bottom: 30 };

function makeBound(source, get, token) {
  const { configs, tokens, gpu, curves, notes } = source.data;
  const [low, high] = [Math.floor(Math.log2(Math.min(1, ...curves.flat()))), Math.ceil(Math.log2(Math.max(2, ...curves.flat())))];
  const { width, height, left, right, top, bottom } = PLOT;
  const x = (step) => left + ((width - left - right) * step) / (tokens.length - 1);
  const y = (gain) => height - bottom - ((height - top - bottom) * (Math.log2(gain) - low)) / (high - low);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, class: "se-plot", role: "img" });
  for (let power = low; power <= high; power++) {
    const place = y(2 ** power);
    svg.append(draw("line", { x1: left, x2: width - right, y1: place, y2: place, class: power === 0 ? "se-dense-line" : "se-grid" }));
    svg.append(draw("text", { x: left - 5, y: place + 4, "text-anchor": "end" }, power < 0 ? `1/${2 ** -power}×` : `${2 ** power}×`));
  }
  tokens.forEach((count, step) => {
    if (step % 3 === 0) svg.append(draw("text", { x: x(step), y: height - bottom + 14, "text-anchor": "middle" }, String(count)));
  });
  svg.append(draw("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "tokens"));
  const cursor = draw("line", { y1: top, y2: height - bottom, class: "se-cursor" });
  const [ideal, usable] = ["se-ideal", "se-usable"].map((name) => draw("path", { class: name }));
  const dots = ["se-dot-ideal", "se-dot"].map((name) => draw("circle", { r: 4, class: name }));
  svg.append(cursor, ideal, usable, ...dots);
  const range = make("input", { type: "range", class: "se-tokens", min: 0, max: tokens.length - 1, step: 1, value: token.step, "aria-label": "tokens" });
  const count = make("output", {});
  const hard = make("output", { class: "se-usable-value" });
  const soft = make("output", { class: "se-ideal-value" });
  const words = make("p", { class: "se-hardware" });
  const line = (gains) => gains.map((gain, step) => `${step ? "L" : "M"}${x(step).toFixed(1)} ${y(gain).toFixed(1)}`).join("");
  range.addEventListener("input", () => { token.step = Number(range.value); token.changed(); });

  function update() {
    const config = configs[get("index")];
    const [all, some] = [source.curve(config.ideal), source.curve(config.usable)];
    const step = token.step;
    range.value = String(step);
    range.setAttribute("aria-valuetext", `${tokens[step]} tokens`);
    count.textContent = String(tokens[step]);
    ideal.setAttribute("d", line(all));
    usable.setAttribute("d", some ? line(some) : "");
    [all, some].forEach((gains, i) => {
      dots[i].setAttribute("visibility", gains ? "visible" : "hidden");
      if (gains) { dots[i].setAttribute("cx", x(step)); dots[i].setAttribute("cy", y(gains[step])); }
    });
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    hard.textContent = some ? `at most ${times(some[step])}` : "not known";
    soft.textContent = `at most ${times(all[step])}`;
    const [verdict, hardware] = config.words.map((number) => notes[number]);
    words.replaceChildren(make("b", {}, `${verdict[0].toUpperCase()}${verdict.slice(1)}. `), hardware);
    svg.setAttribute("aria-label", `Bound on the speed-up of ${config.name} over dense against tokens: ` +
      `${times(all[0])} at 1 token and ${times(all[all.length - 1])} at ${tokens[tokens.length - 1]} if all arithmetic saved were time saved` +
      (some ? `, ${times(some[0])} and ${times(some[some.length - 1])} on tensor cores.` : "."));
  }
  const gain = (look, text, output) => make("p", { class: "se-gain" }, make("i", { class: look }), make("span", {}, text), output);
  const key = make("div", { class: "se-gains" }, gain("se-stroke", "on tensor cores", hard),
    gain("se-stroke se-dashed", "if all arithmetic saved were time saved", soft));
  const slider = make("label", { class: "se-slider" }, make("span", {}, "tokens ", count), range);
  const origin = make("p", { class: "se-key" }, `A bound from a datasheet, not a measurement: ${gpu.source}.`);
  return { node: card(`Its bound on speed, ${gpu.name}`, key, svg, slider, words, origin), update };
}

function makeCompare(source, get, set, token) {
  const { configs, tokens, notes } = source.data;
  const body = make("tbody", {});
  const bound = make("th", { scope: "col" });
  const head = make("tr", {}, ...["structure", "density", "magnitude", "energy", "bits a weight"].map((text) => make("th", { scope: "col" }, text)), bound,
    make("th", { scope: "col" }, make("span", { class: "se-hidden" }, "pin or remove")));
  function row(index, pinned) {
    const { name, kept, bits, ideal, usable, colour, words } = configs[index];
    const shares = kept[get("kind")].slice(0, 3).map((share) => make("td", {}, percent(share)));
    const gain = (source.curve(usable) || source.curve(ideal))[token.step];
    const go = make("button", { type: "button", class: "se-go", "aria-label": `show ${name}` }, make("i", { class: "se-swatch", style: `background: ${colour}` }), ` ${name}`);
    go.addEventListener("click", () => set({ index }));
    const pins = get("pins");
    const pin = make("button", { type: "button", class: "se-pin", "aria-label": `${pinned ? "remove" : "pin"} ${name}` }, pinned ? "×" : "pin");
    pin.addEventListener("click", () => set({ pins: pinned ? pins.filter((other) => other !== index) : [...pins, index] }));
    const shown = index === get("index");
    const node = make("tr", shown ? { class: "se-shown", "aria-current": "true" } : {}, make("th", { scope: "row" }, go, make("small", {}, notes[words[0]])), ...shares,
      make("td", {}, (bits[0] + bits[1]).toFixed(2)), make("td", {}, times(gain)), make("td", {}, pin));
    return node;
  }
  function update() {
    const pins = get("pins");
    bound.textContent = `bound at ${tokens[token.step]} tokens`;
    const loose = pins.includes(get("index")) ? [] : [row(get("index"), false)];
    body.replaceChildren(...loose, ...pins.map((index) => row(index, true)));
  }
  const title = make("p", { class: "se-hint" }, "Side by side: pin a structure to keep its line while you look at others.");
  const table = make("div", { class: "se-table", role: "region", "aria-label": "comparison", tabindex: "0" }, make("table", {}, make("thead", {}, head), body));
  return { node: make("div", { class: "se-compare" }, title, table), update };
}

function render({ model, el }) {
  const source = read(model);
  const get = (name) => model.get(name);
  const set = (changes) => {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
  };
  const token = { step: Math.min(12, source.data.tokens.length - 1), changed: () => update() };
  const said = make("p", { class: "se-hidden", role: "status" });
  const controls = makeControls(source, get, set);
  const mask = makeMask(source, get);
  const parts = [controls, mask, makeKept(source, get), makeBytes(source, get), makeBound(source, get, token), makeCompare(source, get, set, token)];
  const root = make("div", { class: "sparse-explorer" });
  const [, , kept, bytes, bound, compare] = parts.map(({ node }) => node);
  root.append(controls.node, make("div", { class: "se-columns" }, make("div", {}, mask.node, kept), make("div", {}, bytes, bound)), compare, said);
  el.append(root);

  function update() {
    const config = source.data.configs[get("index")];
    root.style.setProperty("--se-family", config.colour);
    parts.forEach((part) => part.update());
    const [density, size] = config.kept[get("kind")];
    said.textContent = `${config.name}: keeps ${percent(density)} of the weights and ${percent(size)} of their magnitude.`;
  }
  const names = ["change:index", "change:kind", "change:pins"];
  names.forEach((name) => model.on(name, update));
  const repaint = () => requestAnimationFrame(mask.paint);
  const theme = new MutationObserver(repaint);
  const attributeFilter = ["data-theme", "data-mode", "class", "style", "data-jp-theme-name", "data-jp-theme-light"];
  for (const node of [document.documentElement, document.body]) theme.observe(node, { attributes: true, attributeFilter });
  const size = new ResizeObserver(repaint);
  size.observe(mask.canvas);
  update();

  return () => {
    names.forEach((name) => model.off(name, update));
    theme.disconnect();
    size.disconnect();
    root.remove();
  };
}

export default { render };
