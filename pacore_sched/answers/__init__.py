"""PaCoRe: rounds of rollouts and their synthesis, files of questions, the journal of a run."""
