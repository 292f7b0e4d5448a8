//! Why datagrams go nowhere.

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])* $name:ident => $label:literal,)*) => {
        /// Why a datagram went nowhere: the closed set behind the metric's label.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum DropReason {
            $($(#[doc = $doc])* $name,)*
        }

        impl DropReason {
            /// All reasons.
            pub const ALL: [Self; [$($label),*].len()] = [$(Self::$name),*];

            /// The metric's label.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self {
                    $(Self::$name => $label,)*
                }
            }
        }
    };
}

drop_reasons! {
    /// From a client: no complete QUIC packet fits.
    TooShort => "too_short",
    /// From a client: longer than [`MAX_DATAGRAM`](crate::forward::MAX_DATAGRAM).
    TooLong => "too_long",
    /// From a client: a long header of another version than 1.
    QuicVersion => "quic_version",
    /// From a client: a destination connection ID of another length than ours.
    CidLength => "cid_length",
    /// From a client: an Initial packet in a datagram below 1,200 bytes.
    InitialSize => "initial_size",
    /// From a client: the connection ID is of no configuration in use.
    CidConfig => "cid_config",
    /// From a client: the connection ID names nobody; forged, most likely.
    UnknownServer => "unknown_server",
    /// From a client: the connection ID names a predecessor of a live worker.
    DeadIncarnation => "dead_incarnation",
    /// From a client: the connection ID names a server that is proven dead; a reset may have been sent instead.
    DeadServer => "dead_server",
    /// From a client: its connection ID comes more often than any call's does, from this address or in all.
    CidRate => "cid_rate",
    /// From a client: the connection ID is of a kind that nobody mints.
    CidKind => "cid_kind",
    /// From a client: a first connection ID on a packet that is no Initial.
    InitialMisused => "initial_misused",
    /// From a client: a first connection ID past its time.
    InitialExpired => "initial_expired",
    /// Either way: a client address that cannot be answered.
    ClientAddress => "client_address",
    /// From the tunnel: not from the address of any route or relay.
    ForeignSource => "foreign_source",
    /// From the tunnel: no frame of our version and direction.
    FrameMalformed => "frame_malformed",
    /// From the tunnel: sealed under a generation that is not in use.
    FrameKey => "frame_key",
    /// From the tunnel: the tag does not verify.
    FrameTag => "frame_tag",
    /// From the tunnel: genuine, but old, or of a clock that is off.
    FrameStale => "frame_stale",
    /// From the tunnel: no hops left.
    FrameHopLimit => "frame_hop_limit",
    /// From the tunnel: of or for another relay's client than its sender may speak of.
    FrameRelay => "frame_relay",
    /// From a relay: for a worker of another region.
    FrameRegion => "frame_region",
    /// From a relay: a notice of a kind that is not known, or too soon after the one before.
    FrameNotice => "frame_notice",
    /// Sending: larger than the path takes.
    PathMtu => "path_mtu",
    /// Sending: the socket's buffer is full.
    SendBuffer => "send_buffer",
    /// Sending: the system refused.
    SendError => "send_error",
}
