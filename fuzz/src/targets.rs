//! All targets.

mod manifests;
mod media;
mod packets;
mod relay;
mod session;

use crate::Target;

/// Every parser that strangers' bytes reach, and every machine that they steer.
pub const TARGETS: &[Target] = &[
    Target {
        name: "connection-id",
        about: "anybody's, in the first bytes of every packet",
        run: packets::connection_id,
        seeds: packets::connection_id_seeds,
    },
    Target { name: "tunnel", about: "anybody's at a tunnel port", run: packets::tunnel, seeds: packets::tunnel_seeds },
    Target { name: "relay-up", about: "anybody's at a relay's public port", run: relay::up, seeds: relay::up_seeds },
    Target {
        name: "relay-frame",
        about: "anybody's at a relay's tunnel port, and what workers and other relays seal",
        run: relay::frame,
        seeds: relay::frame_seeds,
    },
    Target { name: "relay-state", about: "a relay's disk", run: relay::state, seeds: relay::state_seeds },
    Target {
        name: "to-worker",
        about: "a client's control stream",
        run: session::to_worker,
        seeds: session::to_worker_seeds,
    },
    Target {
        name: "to-client",
        about: "a worker's control stream",
        run: session::to_client,
        seeds: session::to_client_seeds,
    },
    Target {
        name: "heartbeat",
        about: "the other end's datagrams",
        run: session::heartbeat,
        seeds: session::heartbeat_seeds,
    },
    Target {
        name: "ticket",
        about: "a client's ticket, genuine and not",
        run: session::ticket,
        seeds: session::ticket_seeds,
    },
    Target {
        name: "session-request",
        about: "an application's JSON",
        run: session::request,
        seeds: session::request_seeds,
    },
    Target {
        name: "credentials",
        about: "API keys, session names, signatures",
        run: session::credentials,
        seeds: session::credentials_seeds,
    },
    Target {
        name: "router-answer",
        about: "what a router tells a client",
        run: session::router_answer,
        seeds: session::router_answer_seeds,
    },
    Target { name: "rtp", about: "the other end's audio packets", run: media::rtp, seeds: media::rtp_seeds },
    Target {
        name: "jitter",
        about: "the order and times in which packets come",
        run: media::jitter,
        seeds: media::jitter_seeds,
    },
    Target { name: "opus", about: "the other end's Opus packets", run: media::opus, seeds: media::opus_seeds },
    Target {
        name: "receiver",
        about: "a whole stream of the other end's",
        run: media::receiver,
        seeds: media::receiver_seeds,
    },
    Target { name: "tones", about: "the caller's sound", run: media::tones, seeds: media::tones_seeds },
    Target { name: "wav", about: "files that are to be played", run: media::wav, seeds: media::wav_seeds },
    Target {
        name: "manifest",
        about: "files that describe a fleet",
        run: manifests::manifest,
        seeds: manifests::manifest_seeds,
    },
];
