"use strict";
// The link is …/gsb/#SESSION:TOKEN; a fragment is never sent, so the token stays out of server logs.
const [session, token] = location.hash.slice(1).split(":").map(decodeURIComponent);
const $ = (id) => document.getElementById(id);
const storageKey = `hywu-gsb-${session}-${(token || "").slice(0, 8)}`;
let voter = localStorage.getItem(storageKey);
let current = null;
let last = null;
let busy = false;
let urls = {};
let view = { scale: 1, x: 0, y: 0 };

async function request(path, body) {
  const options = { headers: { "X-HYWU-Token": token || "" } };
  if (body) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify({ voter, ...body });
  }
  const answer = await fetch(`s/${encodeURIComponent(session)}/${path}`, options);
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({}));
    const error = new Error(problem.error || `The server answered ${answer.status}.`);
    error.status = answer.status;
    throw error;
  }
  return answer;
}

async function show(state) {
  $("name").textContent = document.title = state.name;
  $("bar").max = state.total || 1;
  $("bar").value = state.done;
  $("progress").textContent = `${state.done} of ${state.total}`;
  last = state.last;
  $("undo").hidden = !last;
  $("join").hidden = true;
  $("finished").hidden = Boolean(state.pair);
  $("compare").hidden = !state.pair;
  const old = urls;
  current = null;
  urls = {};
  if (state.pair) {
    $("instruction").textContent = state.pair.instruction;
    for (const side of ["left", "right"]) $(side).removeAttribute("src");
    await Promise.all(["source", "left", "right"].map(async (name) => {
      const blob = await (await request(`image/${state.pair[name]}`)).blob();
      urls[name] = URL.createObjectURL(blob);
    }));
    for (const side of ["left", "right"]) $(side).src = urls[side];
    await Promise.all(["left", "right"].map((side) => $(side).decode()));
    setFlip(false);
    fit();
    current = state.pair;
  }
  Object.values(old).forEach(URL.revokeObjectURL);
}

// One request at a time: a held key can't vote on a pair that hasn't been seen.
async function act(work) {
  if (busy) return;
  busy = true;
  try {
    $("message").textContent = "";
    await work();
  } catch (error) {
    let text = error.message;
    if (error.status === 409) {
      await refresh().catch((again) => { text = again.message; });
    } else if (error instanceof TypeError) {
      text = "The server can't be reached; nothing was counted that you weren't shown. Try again.";
    }
    $("message").textContent = text;
  } finally {
    busy = false;
  }
}

const refresh = async () => show(await (await request("state", {})).json());
const vote = (choice) => current && act(async () => {
  await show(await (await request("vote", { pair: current.id, choice })).json());
});
const undo = () => last && act(async () => {
  await show(await (await request("undo", { pair: last })).json());
});

function setFlip(on, front = "left") {
  $("views").classList.toggle("flip", on);
  $("flip").setAttribute("aria-pressed", String(on));
  for (const side of ["left", "right"]) $(`figure-${side}`).classList.toggle("front", side === front);
}
function flip() {
  const on = $("views").classList.contains("flip");
  setFlip(true, on && $("figure-left").classList.contains("front") ? "right" : "left");
}
function sides() { setFlip(false); }

function source(on) {
  if (!urls.source) return;
  for (const side of ["left", "right"]) $(side).src = on ? urls.source : urls[side];
}

function draw() {
  for (const side of ["left", "right"]) {
    $(side).style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
  }
}
function fit() { view = { scale: 1, x: 0, y: 0 }; draw(); }
function zoom(factor, x, y) {
  const scale = Math.min(16, Math.max(1, view.scale * factor));
  const ratio = scale / view.scale;
  view = scale === 1 ? { scale, x: 0, y: 0 }
    : { scale, x: x - (x - view.x) * ratio, y: y - (y - view.y) * ratio };
  draw();
}
function zoomCentre(factor) {
  const box = document.querySelector("figure.front .view").getBoundingClientRect();
  zoom(factor, box.width / 2, box.height / 2);
}

for (const box of document.querySelectorAll(".view")) {
  const pointers = new Map();
  const place = (e) => {
    const r = box.getBoundingClientRect();
    return { x: e.clientX - r.left, y: e.clientY - r.top };
  };
  const spread = () => {
    const [p, q] = [...pointers.values()];
    return { d: Math.hypot(p.x - q.x, p.y - q.y) || 1, x: (p.x + q.x) / 2, y: (p.y + q.y) / 2 };
  };
  box.addEventListener("wheel", (e) => {
    e.preventDefault();
    const p = place(e);
    zoom(Math.exp(-e.deltaY / 400), p.x, p.y);
  }, { passive: false });
  box.addEventListener("pointerdown", (e) => {
    box.setPointerCapture(e.pointerId);
    pointers.set(e.pointerId, place(e));
  });
  box.addEventListener("pointermove", (e) => {
    if (!pointers.has(e.pointerId)) return;
    const before = pointers.size === 2 ? spread() : null;
    const from = pointers.get(e.pointerId);
    const to = place(e);
    pointers.set(e.pointerId, to);
    if (before) {
      const after = spread();
      zoom(after.d / before.d, after.x, after.y);
    } else if (view.scale > 1) {
      view.x += to.x - from.x;
      view.y += to.y - from.y;
      draw();
    }
  });
  for (const end of ["pointerup", "pointercancel"]) {
    box.addEventListener(end, (e) => pointers.delete(e.pointerId));
  }
}

$("vote-left").onclick = () => vote("left");
$("vote-same").onclick = () => vote("same");
$("vote-right").onclick = () => vote("right");
$("undo").onclick = undo;
$("flip").onclick = flip;
$("fit").onclick = () => { sides(); fit(); };
$("in").onclick = () => zoomCentre(1.5);
$("out").onclick = () => zoomCentre(1 / 1.5);
$("source").addEventListener("pointerdown", () => source(true));
for (const end of ["pointerup", "pointerleave", "pointercancel", "blur"]) {
  $("source").addEventListener(end, () => source(false));
}
$("source").addEventListener("contextmenu", (e) => e.preventDefault());

const keys = {
  1: () => vote("left"), ArrowLeft: () => vote("left"),
  2: () => vote("same"), ArrowDown: () => vote("same"),
  3: () => vote("right"), ArrowRight: () => vote("right"),
  u: undo, f: flip, 0: () => { sides(); fit(); }, s: () => source(true),
  "+": () => zoomCentre(1.5), "-": () => zoomCentre(1 / 1.5),
};
const keyOf = (e) => (e.key.length === 1 ? e.key.toLowerCase() : e.key);
addEventListener("keydown", (e) => {
  if (e.repeat || e.ctrlKey || e.metaKey || e.altKey || e.target.tagName === "INPUT") return;
  const action = keys[keyOf(e)];
  if (!action) return;
  e.preventDefault();
  action();
});
addEventListener("keyup", (e) => { if (keyOf(e) === "s") source(false); });
addEventListener("blur", () => source(false));

$("join").addEventListener("submit", (e) => {
  e.preventDefault();
  const random = [...crypto.getRandomValues(new Uint8Array(6))]
    .map((n) => n.toString(16).padStart(2, "0")).join("");
  voter = $("voter").value.trim() || `anonymous-${random}`;
  localStorage.setItem(storageKey, voter);
  act(refresh);
});
addEventListener("hashchange", () => location.reload());

if (!token) $("message").textContent = "This link is incomplete: open the whole link you were given.";
else if (voter) act(refresh);
else $("join").hidden = false;
