//! The data that a store keeps, and its bytes; no behaviour.

pub(crate) mod codec;
mod framing;
pub(crate) mod intent;
pub(crate) mod record;
pub(crate) mod request;
pub(crate) mod response;
