//! A placement refusal inside a gRPC error.
//!
//! The refusal travels in the `grpc-status-details-bin` trailer as the richer error model wants it: a
//! `google.rpc.Status` whose details hold one `Any` with the message.

use prost::Message as _;
use prost_types::Any;
use tonic::{Code, Status};

use crate::v1::Refusal;

/// `google.rpc.Status`, three fields that have not changed since 2016.
#[derive(Clone, PartialEq, prost::Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// Wraps a refusal into a gRPC error; the message is the refusal's detail.
#[must_use]
pub fn to_status(code: Code, refusal: &Refusal) -> Status {
    let any = Any { type_url: TYPE_URL.to_owned(), value: refusal.encode_to_vec() };
    let rich = RpcStatus { code: code.into(), message: refusal.detail.clone(), details: vec![any] };
    Status::with_details(code, refusal.detail.clone(), rich.encode_to_vec().into())
}

/// The refusal inside a gRPC error, or `None` if it carries none. The bytes come from the other side and may be
/// anything.
#[must_use]
pub fn of_status(status: &Status) -> Option<Refusal> {
    let rich = RpcStatus::decode(status.details()).ok()?;
    let any = rich.details.iter().find(|any| any.type_url == TYPE_URL)?;
    Refusal::decode(any.value.as_slice()).ok()
}

const TYPE_URL: &str = "type.googleapis.com/antiphon.v1.Refusal";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_refusal_survives_the_status() {
        let refusal = Refusal {
            reason: "no_capacity".into(),
            detail: "every worker is full".into(),
            retry_after_ms: 500,
            ..Refusal::default()
        };
        let status = to_status(Code::ResourceExhausted, &refusal);
        assert_eq!(status.message(), "every worker is full");
        assert_eq!(of_status(&status), Some(refusal));
        assert_eq!(of_status(&Status::not_found("x")), None);
    }

    proptest! {
        #[test]
        fn foreign_details_never_panic(bytes: Vec<u8>) {
            let status = Status::with_details(Code::Internal, "x", bytes.into());
            let _ = of_status(&status);
        }
    }
}
