// Reads openapi.json, with a key if the server needs one, and shows it in Swagger UI or in ReDoc.
// All addresses are relative to this page, so that it works behind a proxy's path prefix.

const KEY = "minisrv.key"; // where the chat page keeps it, too, as long as the tab lives
const here = new URL(".", location.href);
const api = document.querySelector("#api");
const login = document.querySelector("#login");

function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

async function load() {
  const headers = key() ? { Authorization: `Bearer ${key()}` } : {};
  const response = await fetch(new URL("openapi.json", here), { headers });
  const body = await response.json();
  if (response.status === 401) {
    ask(key() ? "The server does not know this key." : "This server needs a key.");
  } else if (response.ok) {
    login.hidden = true;
    show(body);
  } else {
    ask(body.error.message);
  }
}

function ask(why) {
  document.querySelector("#why").textContent = why;
  login.hidden = false;
  document.querySelector("#key").focus();
}

function show(spec) {
  spec.servers = [{ url: here.href.replace(/\/$/, "") }];
  if (api.dataset.viewer === "redoc") {
    Redoc.init(spec, { disableSearch: true }, api);
    return;
  }
  const ui = SwaggerUIBundle({
    spec,
    domNode: api,
    deepLinking: true,
    validatorUrl: null,
    presets: [SwaggerUIBundle.presets.apis],
    onComplete: () => {
      if (key()) ui.preauthorizeApiKey("bearer", key());
    },
  });
}

login.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, document.querySelector("#key").value.trim());
  load();
});

load();
