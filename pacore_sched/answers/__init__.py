"""PaCoRe: rounds of rollouts and their synthesis, question files, and the run journal."""
