// Validates custom resources: a JSON list of objects on standard input, a list of problems for each on standard output.
//
//   node .ci/custom-resources.mjs FOLDER_OF_PACKAGES < objects.json
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const PACKAGES = {
  "gateway.networking.k8s.io": "gateway-api",
  "keda.sh": "keda",
  "monitoring.coreos.com": "prometheus-operator",
};

async function problemsOf(object) {
  const { validate } = (await modelOf(object)).prototype;
  const watched = new Watched(object);
  try {
    validate.call(watched.proxy);
  } catch (error) {
    if (!Array.isArray(error.errors)) throw error; // not a verdict
    return error.errors.map(({ instancePath, message }) => `${instancePath}: ${message}`);
  }
  return watched.unread("").map((path) => `${path}: unknown field`);
}

async function modelOf({ apiVersion, kind }) {
  const name = PACKAGES[apiVersion.split("/")[0]];
  if (!name) throw new Error(`no schema for ${apiVersion} ${kind}`);
  const path = join(folder, "@kubernetes-models", name, apiVersion, `${kind}.js`);
  return (await import(pathToFileURL(path)))[kind];
}

// The validators let fields pass that the schema does not have, where the API server drops them (or, strict, refuses the
// object). But they read every field that the schema does have: what nobody read is unknown.
class Watched {
  constructor(value) {
    this.value = value;
    this.children = new Map();
    this.proxy = new Proxy(value, { get: (_, key) => this.read(key) });
  }

  read(key) {
    const value = this.value[key];
    if (!Object.hasOwn(this.value, key) || key === "length") return value;
    if (!this.children.has(key)) {
      this.children.set(key, value !== null && typeof value === "object" ? new Watched(value) : null);
    }
    return this.children.get(key)?.proxy ?? value;
  }

  unread(path) {
    return Object.keys(this.value).flatMap((key) => {
      if (!this.children.has(key)) return [`${path}/${key}`];
      return this.children.get(key)?.unread(`${path}/${key}`) ?? [];
    });
  }
}

const folder = process.argv[2];
const objects = JSON.parse(readFileSync(0, "utf8"));
const problems = [];
for (const object of objects) problems.push(await problemsOf(object));
process.stdout.write(JSON.stringify(problems));
