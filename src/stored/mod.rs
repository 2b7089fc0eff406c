//! What is kept: data and its bytes, without behaviour.

pub(crate) mod codec;
pub(crate) mod intent;
pub(crate) mod record;
pub(crate) mod request;
pub(crate) mod response;
