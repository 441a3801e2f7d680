// The server's endpoints. A call that resolves was answered with 200; everything else throws a Refusal.

export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status; // 0: there was no answer at all
  }
}

async function call(method, path, body) {
  const options = { method, credentials: "same-origin", signal: AbortSignal.timeout(15000) };
  if (body !== undefined) {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  let response, reply;
  try {
    response = await fetch(path, options);
    reply = await response.json();
  } catch {
    throw new Refusal("The server does not answer.", response && response.status < 500 ? response.status : 0);
  }
  if (!response.ok) throw new Refusal(reply.error ?? "The server refused.", response.status >= 500 ? 0 : response.status);
  return reply;
}

export const login = (token) => call("POST", "api/login", { token });
export const logout = () => call("POST", "api/logout", {});
export const next = () => call("POST", "api/next", {});
export const answer = (duel, choice) => call("POST", "api/answer", { duel, choice });
export const undo = (duel) => call("POST", "api/undo", { duel });
export const guidelines = () => call("GET", "api/guidelines");
