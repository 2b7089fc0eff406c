//! Recovery of work that no client came back for: dangling intents and abandoned requests.

pub(crate) mod completer;
pub(crate) mod reconciler;
mod schedule;

pub use self::{
    completer::{Completer, CompleterPass, Refused, Restore},
    reconciler::{Lookup, Reconcile, Reconciler, ReconcilerPass},
};
pub use crate::layer::kept_requests::KeptRequests;
