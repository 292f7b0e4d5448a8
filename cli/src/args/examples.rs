//! What `--help` says at its end.

pub(super) const EXAMPLES: &str = "\
Examples:
  antiphon up examples/three-clouds                  a fleet on this machine, until Ctrl-C
  antiphon call frontdesk --save answer.wav          in another terminal
  antiphon COMMAND --help                            more of each";
pub(super) const CREATE_EXAMPLES: &str = "\
Examples:
  antiphon keys create --tenant acme                 for all agents
  antiphon keys create --tenant acme --agent shop/frontdesk --agent 'billing/*'";
pub(super) const LIST_EXAMPLES: &str = "\
Examples:
  antiphon keys list
  antiphon keys list --json | jq -r '.[] | select(.tenant == \"acme\") | .id'";
pub(super) const REVOKE_EXAMPLES: &str = "\
Examples:
  antiphon keys revoke 0123456789ab                  calls that are live go on; new ones are refused";
pub(super) const ENCODE_EXAMPLES: &str = "\
Examples:
  antiphon cid encode c4605e 4504cc4f --key 8f95f09245765f80256934e50c66207f
  antiphon cid encode 31441a 9c69c275                plain text";
pub(super) const DECODE_EXAMPLES: &str = "\
Examples:
  antiphon cid decode --fleet 90…                    a connection ID of the fleet, as packet captures show it
  antiphon cid decode 07893540d654162a --server-id-len 3 --key 8f95f09245765f80256934e50c66207f";
pub(super) const ROTATE_EXAMPLES: &str = "\
Examples:
  antiphon keys rotate                               until everything new uses the next generation
  antiphon keys rotate --until unused                until the older one is out of use
  antiphon keys rotate --no-wait && antiphon keys generations";
pub(super) const GENERATIONS_EXAMPLES: &str = "\
Examples:
  antiphon keys generations
  antiphon keys generations --wait                   until the older one is out of use
  antiphon keys generations --json | jq -r '.regions[] | select(.wanted > .minting) | .heldUpBy[]'";
pub(super) const UP_EXAMPLES: &str = "\
Examples:
  antiphon up examples/three-clouds                  all manifests of a directory
  antiphon up fleet.yaml --dir /tmp/fleet            keys, identities, state and logs in another place
  antiphon up fleet.yaml --json | head -1 | jq .     what runs where, for scripts";
pub(super) const CALL_EXAMPLES: &str = "\
Examples:
  antiphon call frontdesk --save answer.wav          a built-in sentence
  antiphon call shop/frontdesk --wav hello.wav --wav bye.wav --codec l16-24k
  antiphon call frontdesk --from 52.5,13.4           from Berlin: the nearest region answers
  antiphon call frontdesk --qlog call.sqlog          open it with qvis.quictools.info
  antiphon call frontdesk --json | jq .turns

Columns of the answers:
  ANSWERED AFTER  from the end of the turn to the first sound of the answer
  RECEIPT         what the agent says it heard so far: a number over all turns, read back from the recording
  PROCESS         which worker process answered: another one has another number
  LIKENESS        of the answer's words to the caller's, 1 for the same sound
  LONGEST PAUSE   longest silence within the answer, the speaker's own pauses included
Names in JSON: turns[].responseDelayMs, chain, process, similarity, longestSilenceMs, and problems, empty if the answer
was the caller's own words.

Exit code: 0 if every turn was answered, 130 if a signal ended it, 1 otherwise: refused, cut off, or a turn unanswered.";
pub(super) const STATUS_EXAMPLES: &str = "\
Examples:
  antiphon status
  antiphon status --json | jq '.regions[].workers[] | select(.placeable | not) | {name, whyNot}'";
pub(super) const SESSIONS_EXAMPLES: &str = "\
Examples:
  antiphon sessions
  antiphon sessions --json | jq -r '.sessions[] | select(.turns == 0) | .session'";
pub(super) const EXPLAIN_EXAMPLES: &str = "\
Examples:
  antiphon explain 06AN1CY4PCK5TE6EXZQ6A5T5N8        why it is where it is, and why nowhere else
  antiphon explain 06AN1CY4PCK5TE6EXZQ6A5T5N8 --path which relays and addresses it used, how well, why that changed

Columns:
  VERDICT  what was found; docs/manifests.md, \"Where a call goes\", lists all words
  RTT      round trip from the caller, measured or estimated
  FREE     calls that it could still take
  SCORE    what regions are ordered by, milliseconds: the round trip, more for load and for a lower weight; less is better
  DETAIL   the verdict's figures: which ceiling held, how old the last word is";
pub(super) const WORKERS_EXAMPLES: &str = "\
Examples:
  antiphon workers gone default-frontdesk-1          its machine has burnt down";
pub(super) const RELAYS_EXAMPLES: &str = "\
Examples:
  antiphon relays gone relay-1 --region frankfurt";
pub(super) const KEYS_EXAMPLES: &str = "\
Examples:
  antiphon keys create --tenant acme --agent 'shop/*' an API key, shown once
  antiphon keys list
  antiphon keys revoke 0123456789ab
  antiphon keys rotate                               the fleet's own secrets, during live calls";
pub(super) const DEMO_EXAMPLES: &str = "\
Examples:
  antiphon demo
  antiphon demo --calls 20 --turns 2 --keep kept     recordings, logs and report.json";
pub(super) const CID_EXAMPLES: &str = "\
Examples:
  antiphon cid decode --fleet 90…                    a connection ID of the fleet, as packet captures show it
  antiphon cid encode c4605e 4504cc4f --key 8f95f09245765f80256934e50c66207f";
