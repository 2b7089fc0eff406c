//! The traces of a request in the inner service. They tell a handler's answer from that of a router
//! without the route and from that of admission control, behind which no handler ran.

use std::sync::atomic::{AtomicBool, Ordering};

use http::{Extensions, StatusCode};

/// How far a request got into the inner service.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    /// axum had matched a route before the request came to the layer.
    is_matched: bool,
    /// There is a body, which most handlers would read.
    has_body: bool,
    body_read: AtomicBool,
    suspended: AtomicBool,
}

impl Reach {
    pub(crate) fn new(extensions: &Extensions, has_body: bool) -> Self {
        Self { is_matched: is_matched(extensions), has_body, ..Self::default() }
    }

    /// Notes that the inner service has read from the request's body.
    pub(crate) fn note_read(&self) {
        self.body_read.store(true, Ordering::Relaxed);
    }

    /// Notes that the inner service waits for something.
    pub(crate) fn note_wait(&self) {
        self.suspended.store(true, Ordering::Relaxed);
    }

    /// The inner service has answered without waiting for anything and without reading the body.
    pub(crate) fn was_answered_immediately(&self) -> bool {
        !self.body_read.load(Ordering::Relaxed) && !self.suspended.load(Ordering::Relaxed)
    }

    /// A response of this status comes from a router that has no such route, or from admission
    /// control.
    pub(crate) fn is_turned_away(&self, status: StatusCode) -> bool {
        let body_read = self.body_read.load(Ordering::Relaxed);
        match status {
            StatusCode::NOT_FOUND => !self.is_matched && !body_read,
            // Routes are matched before methods are.
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => !body_read,
            // A handler that has done something has waited for it.
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                self.has_body && self.was_answered_immediately()
            }
            _ => false,
        }
    }
}

#[cfg(feature = "axum")]
fn is_matched(extensions: &Extensions) -> bool {
    extensions.get::<axum::extract::MatchedPath>().is_some()
}

#[cfg(not(feature = "axum"))]
fn is_matched(_: &Extensions) -> bool {
    false
}
