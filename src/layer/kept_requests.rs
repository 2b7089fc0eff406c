//! The settings for keeping requests.

use std::time::Duration;

use http::HeaderName;

use crate::duration::capped;

/// Settings for keeping requests, so that a [`Completer`](crate::recovery::Completer) can send
/// those that are abandoned again.
///
/// Before the handler runs, these parts of a request are kept: method, original path and query,
/// body (without trailers), and the headers `Content-Type`, `Content-Encoding`, that of the key,
/// those that the [`Fingerprinter`](crate::Fingerprinter) covers, and those that are
/// [added](Self::add_header). A request is kept until its record is completed or gone.
///
/// **Credentials are never kept.** Using a layer panics if it would keep `Authorization`,
/// `Cookie`, `Proxy-Authorization`, the header of
/// [`ConsumerExtractor::header`](crate::ConsumerExtractor::header), or another header whose name
/// says that it holds a credential, because it contains `auth`, `token`, `key`, `secret`,
/// `session`, `signature`, `credential`, `password`, `passwd`, `cookie`, `jwt`, `assertion`,
/// `cert`, `oidc` or `dpop`. Name those that are no credentials with
/// [`add_ignored_header`](crate::ConsumerExtractor::add_ignored_header). A value that is [marked as
/// sensitive](http::HeaderValue::is_sensitive) is left out. Do not add other headers that hold
/// credentials. Do not keep requests whose path, query or body holds credentials: those are stored
/// as they are.
///
/// A request that is sent again goes through the whole application. Whatever changes its path,
/// query, content type or body on the way must change the kept request in the same way. Otherwise
/// its fingerprint differs, and it is not run: it waits for an operator. The same holds for a
/// [custom fingerprint](crate::Fingerprinter::custom) over headers that are not kept.
///
/// ```
/// # #[cfg(feature = "sqlite")] {
/// # fn layer(pool: sqlx::SqlitePool) {
/// use http::header;
/// use tower_idempotency::{IdempotencyLayer, recovery::KeptRequests};
///
/// let kept = KeptRequests::new().add_header(header::ACCEPT).add_header(header::ACCEPT_LANGUAGE);
/// let layer = IdempotencyLayer::new(pool).with_kept_requests(kept);
/// # }
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct KeptRequests {
    pub(crate) headers: Vec<HeaderName>,
    pub(crate) abandoned_after: Duration,
}

impl Default for KeptRequests {
    fn default() -> Self {
        Self { headers: Vec::new(), abandoned_after: Duration::from_secs(60) }
    }
}

impl KeptRequests {
    /// Keeps the parts that every request needs, and counts a request as abandoned a minute after
    /// its first lease.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps another header too, with all its lines. `Host` is taken from the URI where HTTP/2 has
    /// it.
    #[must_use]
    pub fn add_header(mut self, name: HeaderName) -> Self {
        self.headers.push(name);
        self
    }

    /// Sets how long a client may take to come back before its request counts as abandoned.
    /// Default: 1 min.
    ///
    /// The time begins at the end of the lease that the attempt has when the request is kept. A
    /// request whose lease is renewed is not abandoned, however long it runs.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::recovery::KeptRequests;
    /// let kept = KeptRequests::new().with_abandoned_after(Duration::from_secs(5 * 60));
    /// ```
    #[must_use]
    pub fn with_abandoned_after(mut self, time: Duration) -> Self {
        self.abandoned_after = capped(time);
        self
    }
}
