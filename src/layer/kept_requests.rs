//! What is kept of a request.

use std::time::Duration;

use http::HeaderName;

/// Which requests are kept so that a [`Completer`](crate::Completer) can send them again when nobody else does.
///
/// Kept are, before the handler runs: method, original path and query, body (without trailers), and these headers:
/// `Content-Type`, `Content-Encoding`, the key's, those that the [`Fingerprinter`](crate::Fingerprinter) covers, and those
/// that are [added](Self::add_header). A request is kept until its record is completed or gone.
///
/// **Credentials are never kept.** A layer cannot be built that would keep `Authorization`, `Cookie`,
/// `Proxy-Authorization`, the header of [`ConsumerExtractor::header`](crate::ConsumerExtractor::header) or one of those
/// that the default extractor takes for credentials (`X-Api-Key`, `Api-Key`, `ApiKey`, `X-Auth-Token`, `X-Access-Token`),
/// and a value that is [marked as sensitive](http::HeaderValue::is_sensitive) is left out. Do not add other headers that
/// hold credentials, and do not keep requests whose path, query or body holds some: those are stored as they are.
///
/// What is sent again goes through the whole application. Whatever changes its path, query, content type or body on the way
/// must change the kept one in the same way, or the fingerprint is another one and the request is not run: it then needs
/// the attention of an operator. The same holds for a [custom fingerprint](crate::Fingerprinter::custom) over headers that
/// are not kept.
///
/// ```
/// # #[cfg(feature = "sqlite")] {
/// # fn layer(pool: sqlx::SqlitePool) {
/// use http::header;
/// use tower_idempotency::{IdempotencyLayer, KeptRequests};
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
    /// Keeps what every request needs, and counts one as abandoned a minute after its first lease.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps another header too: all its lines. `Host` is taken from the URI where HTTP/2 has it.
    #[must_use]
    pub fn add_header(mut self, name: HeaderName) -> Self {
        self.headers.push(name);
        self
    }

    /// Sets for how long the client may come back by itself before the request counts as abandoned: counted from the end of
    /// the lease that the attempt has when the request is kept. A request whose lease is renewed is not abandoned, however
    /// long it runs. Default: 1 min.
    #[must_use]
    pub fn with_abandoned_after(mut self, time: Duration) -> Self {
        self.abandoned_after = time;
        self
    }
}
