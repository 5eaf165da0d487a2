// The report's behaviour: theme, sorting, videos in step, and the block map. No library, no network.
"use strict";
const $ = (id) => document.getElementById(id);
const read = (id) => JSON.parse($(id).textContent);

// Theme: the system's unless the reader chooses.
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  document.dispatchEvent(new Event("themechange"));
});

// Tabs, by click and arrow keys.
document.querySelectorAll("[role=tablist]").forEach((list) => {
  const tabs = [...list.querySelectorAll("[role=tab]")];
  const choose = (chosen) => tabs.forEach((tab) => {
    const on = tab === chosen;
    tab.setAttribute("aria-selected", on);
    tab.tabIndex = on ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !on;
  });
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(i + step + tabs.length) % tabs.length];
      choose(next);
      next.focus();
    });
  });
});

// The table sorts by a heading; a second click turns it round. Cells without a value stay last.
const heads = [...document.querySelectorAll("#scores thead tr:last-child th")];
heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
  const up = head.getAttribute("aria-sort") === "descending" || (column === 0 && !head.hasAttribute("aria-sort"));
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = document.querySelector("#scores tbody");
  const key = (row) => row.cells[column].dataset.v;
  [...body.rows].sort((a, b) => {
    if (!key(a) || !key(b)) return !key(a) - !key(b);
    return (key(a) - key(b)) * (up ? 1 : -1);
  }).forEach((row) => body.append(row));
}));

// Videos in step: the first that decodes is the clock, the others follow it; scrubbing and stepping seek them all.
function player() {
  const { variants, prompts } = read("data-player");
  if (!prompts.length) return;
  const [grid, play, scrub, clock] = ["grid", "play", "scrub", "clock"].map($);
  let videos = [], current = 0, playing = false;
  const duration = () => Math.min(...videos.map((v) => v.duration || Infinity));
  const first = () => videos.find((v) => v.duration) || videos[0]; // the clock; one that does not decode has no duration
  const tell = () => {
    const total = duration(), now = first().currentTime;
    if (!isFinite(total)) return;
    scrub.value = Math.round((1000 * now) / total);
    clock.value = `${now.toFixed(2)} / ${total.toFixed(2)} s`;
  };
  const seek = (time) => {
    const total = duration();
    if (!isFinite(total)) return;
    const target = Math.max(0, Math.min(total - 0.001, time));
    videos.forEach((v) => { v.currentTime = target; });
    tell();
  };
  const set = (on) => {
    playing = on;
    play.classList.toggle("on", on);
    play.setAttribute("aria-label", on ? "Pause" : "Play");
    videos.forEach((v) => { v.playbackRate = Number($("rate").value); on ? v.play().catch(() => {}) : v.pause(); });
    if (!on && videos.length) seek(first().currentTime);
  };
  const step = (by) => {
    if (!videos.length) return;
    // a little after the frame's time, so that rounding does not show the one before
    set(false);
    const fps = prompts[current].fps;
    seek((Math.floor(first().currentTime * fps + 0.02) + by + 0.05) / fps);
  };
  const follow = () => {
    if (playing && videos.length) {
      const total = duration(), lead = first(), now = lead.currentTime;
      if (videos.some((v) => v.ended) || now >= total - 0.02) {
        seek(0);
        videos.forEach((v) => v.play().catch(() => {}));
      } else {
        const late = 0.5 / prompts[current].fps;
        videos.forEach((v) => { if (v !== lead && Math.abs(v.currentTime - now) > late && !v.seeking) v.currentTime = now; });
      }
      tell();
    }
    requestAnimationFrame(follow);
  };
  const show = (index) => {
    const was = playing;
    set(false);
    current = (index + prompts.length) % prompts.length;
    $("prompt").value = current;
    grid.replaceChildren();
    videos = [];
    prompts[current].sources.forEach((source, i) => {
      const cell = document.createElement("figure");
      cell.className = "cell";
      const caption = document.createElement("figcaption");
      const name = document.createElement("b"), share = document.createElement("span");
      name.textContent = variants[i].label;
      share.textContent = ["0 %", "unknown"].includes(variants[i].sparsity) ? "" : variants[i].sparsity;
      caption.append(name, share);
      let view;
      if (source && source.startsWith("data:image/")) {
        view = document.createElement("img");
        Object.assign(view, { src: source, alt: `${variants[i].label}: ${prompts[current].prompt}` });
      } else if (source) {
        view = document.createElement("video");
        Object.assign(view, { src: source, muted: true, playsInline: true, preload: "auto" });
        view.setAttribute("aria-label", `${variants[i].label}: ${prompts[current].prompt}`);
        view.addEventListener("loadedmetadata", () => { cell.style.setProperty("--ratio", view.videoWidth / view.videoHeight); tell(); });
        videos.push(view);
      } else {
        view = document.createElement("div");
        view.className = "absent";
        view.textContent = "no video";
      }
      cell.append(caption, view);
      grid.append(cell);
    });
    if (was) set(true);
  };
  play.addEventListener("click", () => set(!playing));
  scrub.addEventListener("input", () => {
    const share = scrub.value / 1000; // read first: pausing writes the position of the videos into it
    set(false);
    seek(share * duration());
  });
  $("rate").addEventListener("change", () => set(playing));
  $("prompt").addEventListener("change", (event) => show(Number(event.target.value)));
  $("prev").addEventListener("click", () => show(current - 1));
  $("next").addEventListener("click", () => show(current + 1));
  $("player").addEventListener("keydown", (event) => {
    if (["SELECT", "INPUT", "BUTTON"].includes(event.target.tagName) && event.key !== " ") return;
    if (event.key === " " && event.target.tagName === "BUTTON") return;
    const does = {
      " ": () => set(!playing),
      ArrowLeft: () => step(-1),
      ArrowRight: () => step(1),
      ArrowUp: () => show(current - 1),
      ArrowDown: () => show(current + 1),
    }[event.key];
    if (does) { event.preventDefault(); does(); }
  });
  show(0);
  follow();
}
player();

// The block map: token (t h + y) w + x stands at a place n of the token order; query block n / block_q, key block n / block_k.
function blockMap() {
  const maps = read("data-maps");
  if (!maps.length) return;
  const [frames, matrix, pickVariant, pickLayer] = ["map-frames", "map-matrix", "map-variant", "map-layer"].map($);
  const images = maps.map((map) => {
    if (!map.frames) return null;
    const image = new Image();
    image.onload = () => draw();
    image.src = map.frames.src;
    return image;
  });
  const places = maps.map((map) => { // of the tokens in raster order
    const [t, h, w] = map.grid, found = new Int32Array(t * h * w);
    for (let n = 0; n < found.length; n++) found[map.order ? map.order[n] : n] = n;
    return found;
  });
  let row = 0;
  const map = () => maps[pickVariant.value];
  const place = (f, y, x) => places[pickVariant.value][(f * map().grid[1] + y) * map().grid[2] + x];
  const layer = () => map().layers[pickLayer.value];
  const sizes = () => {
    const [t, h, w] = map().grid, ratio = map().frames ? map().frames.width / map().frames.height : w / h;
    const room = Math.max(240, Math.min(frames.parentElement.clientWidth, 760));
    const columns = Math.min(t, room > 560 ? 8 : 4), gap = 4;
    const width = Math.floor((room - gap * (columns - 1)) / columns);
    return { t, h, w, columns, gap, width, height: Math.round(width / ratio) };
  };
  const canvas = (element, width, height) => {
    const scale = devicePixelRatio || 1;
    Object.assign(element, { width: width * scale, height: height * scale });
    Object.assign(element.style, { width: `${width}px`, height: `${height}px` });
    const context = element.getContext("2d");
    context.scale(scale, scale);
    return context;
  };
  function draw() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const { t, h, w, columns, gap, width, height } = sizes(), m = map(), picture = images[pickVariant.value];
    const kept = new Set(layer().map[row]);
    const context = canvas(frames, columns * (width + gap) - gap, Math.ceil(t / columns) * (height + gap) - gap);
    for (let f = 0; f < t; f++) {
      const x0 = (f % columns) * (width + gap), y0 = Math.floor(f / columns) * (height + gap);
      if (picture && picture.complete) context.drawImage(picture, f * m.frames.width, 0, m.frames.width, m.frames.height, x0, y0, width, height);
      else { context.fillStyle = colour("--rule"); context.fillRect(x0, y0, width, height); }
      for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {
        const n = place(f, y, x);
        const left = x0 + (x * width) / w, top = y0 + (y * height) / h, cw = width / w, ch = height / h;
        if (kept.has(Math.floor(n / m.block_k))) {
          context.fillStyle = colour("--c1"); context.globalAlpha = 0.16;
        } else { context.fillStyle = "#08090b"; context.globalAlpha = 0.62; }
        context.fillRect(left, top, cw + 0.5, ch + 0.5);
        context.globalAlpha = 1;
        if (Math.floor(n / m.block_q) === row) {
          const same = (dy, dx) => {
            const yy = y + dy, xx = x + dx;
            return yy >= 0 && yy < h && xx >= 0 && xx < w && Math.floor(place(f, yy, xx) / m.block_q) === row;
          };
          context.strokeStyle = "#fff"; context.lineWidth = 2; context.beginPath();
          if (!same(-1, 0)) { context.moveTo(left, top + 1); context.lineTo(left + cw, top + 1); }
          if (!same(1, 0)) { context.moveTo(left, top + ch - 1); context.lineTo(left + cw, top + ch - 1); }
          if (!same(0, -1)) { context.moveTo(left + 1, top); context.lineTo(left + 1, top + ch); }
          if (!same(0, 1)) { context.moveTo(left + cw - 1, top); context.lineTo(left + cw - 1, top + ch); }
          context.stroke();
        }
      }
    }
    const tokens = t * h * w, rows = layer().map.length, cols = Math.ceil((tokens + m.text_tokens) / m.block_k);
    const side = Math.min(320, frames.parentElement.clientWidth - 4), cell = Math.max(1, Math.floor(side / Math.max(rows, cols)));
    const second = canvas(matrix, cols * cell, rows * cell);
    second.fillStyle = colour("--panel"); second.fillRect(0, 0, cols * cell, rows * cell);
    layer().map.forEach((keys, r) => {
      second.fillStyle = colour(r === row ? "--c1" : "--faint");
      keys.forEach((k) => second.fillRect(k * cell, r * cell, Math.max(1, cell - 0.5), Math.max(1, cell - 0.5)));
    });
    second.strokeStyle = colour("--c1"); second.strokeRect(0.5, row * cell + 0.5, cols * cell - 1, cell - 1);
    const all = layer().map.reduce((sum, keys) => sum + keys.length, 0);
    $("map-said").value = `query block ${row} keeps ${kept.size} of ${cols} key blocks; this head leaves out ${(100 * (1 - all / (rows * cols))).toFixed(1)} %`;
  }
  const go = (to) => { row = Math.max(0, Math.min(layer().map.length - 1, to)); draw(); };
  const fill = () => {
    pickLayer.replaceChildren(...map().layers.map((l, i) => new Option(`layer ${l.layer}, head ${l.head}`, i)));
    go(row);
  };
  pickVariant.addEventListener("change", fill);
  pickLayer.addEventListener("change", () => go(row));
  frames.addEventListener("click", (event) => {
    const { t, h, w, columns, gap, width, height } = sizes();
    const column = Math.floor(event.offsetX / (width + gap)), line = Math.floor(event.offsetY / (height + gap));
    const f = line * columns + column;
    if (f >= t) return;
    const x = Math.min(w - 1, Math.floor(((event.offsetX - column * (width + gap)) / width) * w));
    const y = Math.min(h - 1, Math.floor(((event.offsetY - line * (height + gap)) / height) * h));
    go(Math.floor(place(f, y, x) / map().block_q));
  });
  matrix.addEventListener("click", (event) => go(Math.floor((event.offsetY / matrix.clientHeight) * layer().map.length)));
  [frames, matrix].forEach((element) => element.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (step) { event.preventDefault(); go(row + step); }
  }));
  document.addEventListener("themechange", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("resize", draw);
  row = Math.floor(map().layers[0].map.length / 2);
  fill();
}
blockMap();
