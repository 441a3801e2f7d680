// The server's endpoints. A call that resolves was answered with 200; everything else throws a Refusal.

export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status; // 0: there was no answer at all, or asking again will bring one
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
  // A server that is too busy (429) will answer later; at the login the same number means too many wrong tokens.
  const passing = response.status >= 500 || (response.status === 429 && path !== "api/login");
  if (!response.ok) throw new Refusal(reply.error ?? "The server refused.", passing ? 0 : response.status);
  return reply;
}

export const login = (token) => call("POST", "api/login", { token });
export const logout = () => call("POST", "api/logout", {});
export const next = () => call("POST", "api/next", {});
export const answer = (duel, choice) => call("POST", "api/answer", { duel, choice });
export const undo = (duel) => call("POST", "api/undo", { duel });
export const guidelines = () => call("GET", "api/guidelines");
