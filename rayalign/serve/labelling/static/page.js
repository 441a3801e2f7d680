// One comparison after the other. "Saved" is said only after the server has said so; until then the choice is kept and
// sent again, which the server takes as the same answer.

import * as api from "./api.js";
import { showText } from "./text.js";

const POLL_MS = 3000;
const RETRY_MS = 2000;
const KEYS = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", t: "tie", s: "skip" };
const byId = (id) => document.getElementById(id);
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

let task = null; // the comparison on the screen
let undoable = null; // id of the duel whose answer may be taken back
let busy = false; // a request is under way: keys and buttons do nothing
let timer = null; // the next poll

// -- what is on the screen ----------------------------------------------------------------------------------------
function say(text) { byId("status").textContent = text; }
function complain(text) { byId("problem").textContent = text; }

function setBusy(value) {
  busy = value;
  for (const button of document.querySelectorAll("[data-choice]")) button.setAttribute("aria-disabled", String(value));
  byId("undo").disabled = undoable === null;
}

function showLogin() {
  clearTimeout(timer);
  task = null;
  byId("work").hidden = byId("logout").hidden = true;
  byId("progress").textContent = "";
  byId("login").hidden = false;
  byId("token").focus();
}

function showState(reply) {
  const { answered, skipped, open } = reply.progress;
  undoable = reply.undo;
  byId("progress").textContent =
    `${reply.annotator}: ${answered} answered, ${skipped} skipped. Waiting for votes: ${open}.`;
}

function showTask(next) {
  const changed = next?.duel !== task?.duel;
  const wasWaiting = !byId("waiting").hidden;
  task = next;
  byId("task").hidden = task === null;
  byId("waiting").hidden = task !== null;
  if (task === null) {
    if (!wasWaiting) byId("waiting").focus();
    timer = setTimeout(poll, POLL_MS);
  } else if (changed) {
    for (const part of ["prompt", "left", "right"]) showText(byId(part), task[part]);
    byId("prompt-title").focus();
    window.scrollTo(0, 0);
  }
}

// -- what is sent -------------------------------------------------------------------------------------------------
// Runs `work` alone; a lost connection is tried again until the server answers.
async function alone(work) {
  if (busy) return;
  clearTimeout(timer);
  setBusy(true);
  try {
    for (;;) {
      try {
        await work();
        complain("");
        return;
      } catch (error) {
        if (!(error instanceof api.Refusal)) throw error;
        if (error.status === 401) {
          say("");
          complain(byId("login").hidden ? "You are logged out. Log in to go on." : error.message);
          return showLogin();
        }
        if (error.status !== 0) {
          say("");
          complain(error.message);
          return await fetchNext();
        }
        complain(`${error.message} Trying again.`);
        await pause(RETRY_MS);
      }
    }
  } catch (error) {
    complain(`${error.message} Reload the page.`);
  } finally {
    setBusy(false);
  }
}

async function fetchNext() {
  const reply = await api.next();
  showState(reply);
  showTask(reply.task);
}

const poll = () => alone(fetchNext);

function choose(choice) {
  if (task === null) return;
  const duel = task.duel;
  let saved = false;
  return alone(async () => {
    if (!saved) {
      say("Saving");
      showState(await api.answer(duel, choice));
      saved = true;
      say(`Saved: ${choice}.`);
    }
    await fetchNext();
  });
}

function undo() {
  if (undoable === null) return;
  const duel = undoable;
  return alone(async () => {
    showState(await api.undo(duel));
    await fetchNext();
    say("Undone. Here it is again.");
  });
}

async function enter() {
  await fetchNext();
  byId("login").hidden = true;
  byId("work").hidden = byId("logout").hidden = false;
  showText(byId("guidelines"), (await api.guidelines()).guidelines);
  (task === null ? byId("waiting") : byId("prompt-title")).focus();
}

// -- what the annotator does --------------------------------------------------------------------------------------
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || byId("work").hidden) return;
  if (event.target instanceof HTMLInputElement || !byId("shortcuts").checked) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "u") undo();
  else if (key in KEYS) choose(KEYS[key]);
  else return;
  event.preventDefault();
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => choose(button.dataset.choice));
}
byId("undo").addEventListener("click", undo);
byId("logout").addEventListener("click", () => alone(async () => { await api.logout(); say("Logged out."); showLogin(); }));
byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = byId("token").value.trim();
  alone(async () => {
    await api.login(token);
    byId("token").value = "";
    say("");
    await enter();
  });
});

alone(async () => {
  try {
    await enter();
  } catch (error) {
    if (error.status !== 401) throw error;
    showLogin();
  }
});
