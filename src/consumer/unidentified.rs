//! Reasons why a consumer is not identified, and guesses: each is logged once in the life of the
//! process.

use std::{
    collections::BTreeSet,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use http::HeaderName;

use crate::redact::TRACING_TARGET;

/// The reason why the consumer of a request is not identified.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unidentified {
    #[error("no Consumer is in the extensions of the request")]
    NoExtension,
    #[error("the closure of ConsumerExtractor::from_fn has found no consumer")]
    NoneFound,
    #[error("the header {0} is missing, repeated, or its value is no consumer")]
    NoHeader(HeaderName),
    #[error("the request has no Authorization header")]
    NoAuthorization,
    #[error("the request has more than one Authorization header")]
    SeveralAuthorizations,
    #[error("the scheme of Authorization is neither Basic nor Bearer, or its value is malformed")]
    OtherScheme,
    #[error(
        "the Bearer token is of a kind that is refreshed, such as a JWT: a retry with the new token would \
         run again"
    )]
    Refreshed,
    #[error("the header {0} says who sends the request, and this layer cannot read it")]
    OtherCredential(HeaderName),
    #[error("the request has a cookie, which may be a session")]
    Cookie,
    #[error("the URI of the request holds a credential")]
    CredentialInUri,
}

impl Unidentified {
    /// Logs the reason, if it is the first time in this process.
    pub(crate) fn log(&self) {
        let cause = self.to_string();
        // Clients name these headers: their number is bounded.
        let most = if matches!(self, Self::OtherCredential(_)) { MAX_HEADERS } else { usize::MAX };
        if is_first(&cause, most) {
            tracing::error!(
                target: TRACING_TARGET, cause,
                "a request was refused with 403 consumer-unidentified and not performed. Is the \
                 authentication layer outside of the idempotency layer? It must run first and put a \
                 Consumer into the extensions of the request: with axum, add it with .layer() after the \
                 idempotency layer. {}",
                self.remedy()
            );
        }
    }

    fn remedy(&self) -> &'static str {
        match self {
            Self::NoExtension | Self::NoneFound | Self::NoHeader(_) | Self::SeveralAuthorizations => {
                "If it is, the client has sent no valid credentials."
            }
            Self::NoAuthorization | Self::OtherScheme | Self::CredentialInUri => {
                "Without such a layer, choose another ConsumerExtractor."
            }
            Self::Refreshed => {
                "If such tokens never change, choose ConsumerExtractor::authorization_digest()."
            }
            Self::OtherCredential(_) => {
                "If the header says nothing about the sender, name it with \
                 ConsumerExtractor::add_ignored_header(); if a trusted proxy sets it, choose \
                 ConsumerExtractor::header()."
            }
            Self::Cookie => {
                "If the cookie is no credential, name it with ConsumerExtractor::add_ignored_cookie()."
            }
        }
    }
}

/// Says once that all callers without a credential share one scope.
pub(super) fn warn_of_anonymous() {
    static WARNED: AtomicBool = AtomicBool::new(false);
    if is_first_time(&WARNED) {
        tracing::warn!(
            target: TRACING_TARGET,
            "a request without a credential that this layer knows belongs to the anonymous scope, which all \
             such callers share: two that send an equal key and an equal request get the same response. Put \
             a Consumer into the extensions in a layer outside of the idempotency layer, or choose \
             ConsumerExtractor::shared(Consumer::anonymous())"
        );
    }
}

/// Says once that credentials are taken for identities.
pub(super) fn warn_of_digest() {
    static WARNED: AtomicBool = AtomicBool::new(false);
    if is_first_time(&WARNED) {
        tracing::warn!(
            target: TRACING_TARGET,
            "the consumer is a digest of Authorization: a token that is refreshed, or a new password, \
             becomes another consumer, and a retry with it runs again. Put a Consumer into the extensions \
             in a layer outside of the idempotency layer, or choose \
             ConsumerExtractor::authorization_digest()"
        );
    }
}

/// `true` once. Requests do not wait for each other here.
fn is_first_time(warned: &AtomicBool) -> bool {
    !warned.load(Ordering::Relaxed) && !warned.swap(true, Ordering::Relaxed)
}

/// `true` once for each text, for as long as fewer than `most` are known.
fn is_first(text: &str, most: usize) -> bool {
    let mut logged = LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
    logged.len() < most && logged.insert(text.to_owned())
}

static LOGGED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
const MAX_HEADERS: usize = 64;
