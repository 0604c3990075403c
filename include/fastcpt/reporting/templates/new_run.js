// Checks the choices as they are made, and starts the run through Airflow's API.
"use strict";

const form = document.getElementById("choices");
const button = document.getElementById("start");
let conf = null;
let asked = 0;

function typed() {
  const values = Object.fromEntries(new FormData(form));
  for (const box of form.querySelectorAll("input[type=checkbox]")) values[box.name] = box.checked;
  return values;
}

async function send(url, content) {
  return fetch(url, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(content),
  });
}

function show(answer) {
  for (const place of form.querySelectorAll("[id$=-wrong]")) {
    const name = place.id.replace(/-wrong$/, "");
    const words = answer.wrong[name] || "";
    place.textContent = words && `${words}. `;
    const field = document.getElementById(name);
    field.setAttribute("aria-invalid", words ? "true" : "false");
    if (words) field.closest("details")?.setAttribute("open", "");
  }
  for (const [name, value] of Object.entries(answer.own)) {
    const field = document.getElementById(name);
    if (field.tagName === "SELECT") field.options[0].text = `as the recipe says: ${value}`;
    else field.placeholder = value;
  }
  document.getElementById("problems").textContent = answer.problems.join(" ");
  document.getElementById("plan").innerHTML = answer.plan || "<p>There is no plan until the marked fields are corrected.</p>";
  conf = answer.conf || null;
  button.disabled = !conf;
}

async function judge() {
  const mine = ++asked;
  conf = null;
  button.disabled = true;
  document.getElementById("recipe-words").textContent = form.recipe.selectedOptions[0].dataset.words;
  try {
    const answer = await send("judge", typed());
    if (mine !== asked) return; // the choices have changed since
    if (!answer.ok) throw new Error(`${answer.status}: log in again, or ask who may start runs`);
    show(await answer.json());
  } catch (error) {
    document.getElementById("problems").textContent = `The choices could not be checked: ${error.message}`;
  }
}

let waiting;
form.addEventListener("input", () => {
  conf = null;
  button.disabled = true;
  clearTimeout(waiting);
  waiting = setTimeout(judge, 400);
});

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!conf) return;
  button.disabled = true;
  const answer = await send(form.dataset.runs, { logical_date: null, conf });
  const content = await answer.json();
  if (!answer.ok) {
    document.getElementById("problems").textContent = JSON.stringify(content.detail);
    button.disabled = false;
    return;
  }
  const link = document.createElement("a");
  link.target = "_top";
  link.href = form.dataset.run + encodeURIComponent(content.dag_run_id);
  document.body.append(link);
  link.click();
});

judge();
