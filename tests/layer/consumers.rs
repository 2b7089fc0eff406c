//! Whose request it is: credentials that are guessed at, refused or announced, on real requests.

use std::net::SocketAddr;

use axum::{
    Extension, Router,
    extract::Request,
    http::{HeaderName, StatusCode, header},
    middleware::{self, Next},
    response::Response,
    routing::post,
};
use bytes::Bytes;
use http_body_util::Full;
use tower_idempotency::{
    Consumer, ConsumerExtractor, Fingerprinter, IdempotencyKey, IdempotencyLayer, MemoryStore, RejectionCode,
    store::IntoStore,
};

use crate::support::{
    direct::{charge, counting, request, send},
    http::Client,
    log::Log,
    process::in_a_process_of_its_own,
    served::{Count, layer, serve},
};

fn with(headers: &[(&str, &str)]) -> Request {
    let mut request = charge("k");
    for (name, value) in headers {
        request.headers_mut().append(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
    }
    request
}

fn bearer(token: &str) -> Request {
    with(&[("authorization", &format!("Bearer {token}"))])
}

/// Two tokens of one user, as an identity provider makes them a minute apart.
const REFRESHED: [&str; 2] = [
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJ1c2VyLTEiLCJpYXQiOjE3MDAwMDAwMDAsImV4cCI6MTcwMDAwMDA2MH0.\
     kqXCLk3tMaoWLm4vYqfFRbVSx7JQ5uFPa6DDzbmtYb8",
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJ1c2VyLTEiLCJpYXQiOjE3MDAwMDAwNjAsImV4cCI6MTcwMDAwMDEyMH0.\
     h3cPq6p0xY5n3G4bYJZJQpVVd3XgG0rLZ5OaE0t2mZo",
];

#[test]
fn a_refreshed_jwt_never_runs_twice() {
    in_a_process_of_its_own("consumers::a_refreshed_jwt_never_runs_twice", async {
        let (log, _guard) = Log::listen();
        let (app, runs) = counting(layer());
        for token in REFRESHED {
            send(&app, bearer(token)).await.assert_refused(RejectionCode::ConsumerUnidentified);
        }
        assert_eq!(runs.get(), 0);
        let errors = log.lines(&["ERROR tower_idempotency"]);
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(
            errors[0].contains("outside of the idempotency layer") && errors[0].contains("JWT"),
            "{errors:?}"
        );
        assert!(errors[0].contains("authorization_digest()"), "{errors:?}");
        assert!(!errors[0].contains("eyJ"), "{errors:?}");
    });
}

#[tokio::test]
async fn a_user_whose_token_is_refreshed_is_one_consumer_behind_an_authentication_layer() {
    let (app, runs) = counting(layer().with_consumer(ConsumerExtractor::extension()));
    let app = app.layer(middleware::from_fn(authenticate));
    assert_eq!(send(&app, bearer(REFRESHED[0])).await.status, StatusCode::CREATED);
    assert!(send(&app, bearer(REFRESHED[1])).await.is_replay());
    assert_eq!(runs.get(), 1);
}

async fn authenticate(mut request: Request, next: Next) -> Response {
    if request.headers().contains_key(header::AUTHORIZATION) {
        request.extensions_mut().insert(Consumer::new("user-1").unwrap());
    }
    next.run(request).await
}

#[test]
fn an_opaque_token_is_announced_once_as_a_guess() {
    in_a_process_of_its_own("consumers::an_opaque_token_is_announced_once_as_a_guess", async {
        let (log, _guard) = Log::listen();
        let (app, runs) = counting(layer());
        assert_eq!(send(&app, bearer("t1")).await.status, StatusCode::CREATED);
        assert_eq!(send(&app, bearer("t2")).await.status, StatusCode::CREATED);
        let (other, _) = counting(layer());
        send(&other, bearer("t1")).await;
        assert!(send(&app, bearer("t1")).await.is_replay());
        assert_eq!(runs.get(), 2);
        let warnings = log.lines(&["WARN tower_idempotency"]);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains("a token that is refreshed"), "{warnings:?}");
    });
}

#[test]
fn a_guess_that_is_chosen_is_not_announced() {
    in_a_process_of_its_own("consumers::a_guess_that_is_chosen_is_not_announced", async {
        let (log, _guard) = Log::listen();
        let (app, runs) = counting(layer().with_consumer(ConsumerExtractor::authorization_digest()));
        assert_eq!(send(&app, bearer(REFRESHED[0])).await.status, StatusCode::CREATED);
        assert!(send(&app, bearer(REFRESHED[0])).await.is_replay());
        let (shared, _) = counting(layer().with_consumer(ConsumerExtractor::shared(Consumer::anonymous())));
        assert_eq!(send(&shared, with(&[("x-api-key", "a")])).await.status, StatusCode::CREATED);
        assert!(send(&shared, with(&[("x-api-key", "b")])).await.is_replay());
        assert_eq!(runs.get(), 1);
        assert!(
            log.lines(&["WARN tower_idempotency"]).is_empty()
                && log.lines(&["ERROR tower_idempotency"]).is_empty(),
            "{log:?}"
        );
    });
}

#[tokio::test]
async fn a_credential_in_a_header_that_is_not_known_never_shows_anothers_response() {
    for name in ["x-merchant-token", "x-forwarded-user", "x-client-cert", "x-signature", "x-account"] {
        let (app, runs) = counting(layer());
        for value in ["m1", "m2"] {
            let answer = send(&app, with(&[(name, value)])).await;
            answer.assert_refused(RejectionCode::ConsumerUnidentified);
        }
        assert_eq!(runs.get(), 0, "{name}");
    }
}

#[tokio::test]
async fn a_credential_in_the_uri_is_refused() {
    let (app, runs) = counting(layer());
    for uri in ["/charges?api_key=m1", "/charges?a=1&access_token=m1", "http://m1:secret@pay.example/charges"]
    {
        let mut request = charge("k");
        *request.uri_mut() = uri.parse().unwrap();
        send(&app, request).await.assert_refused(RejectionCode::ConsumerUnidentified);
    }
    assert_eq!(runs.get(), 0);
}

#[test]
fn the_anonymous_scope_is_announced_once() {
    in_a_process_of_its_own("consumers::the_anonymous_scope_is_announced_once", async {
        let (log, _guard) = Log::listen();
        let (app, runs) = counting(layer());
        let ordinary =
            [("x-request-id", "1"), ("traceparent", "2"), ("x-csrf-token", "3"), ("sec-fetch-user", "?1")];
        for headers in [&[][..], &ordinary, &[("x-shop", "s1")]] {
            assert_eq!(send(&app, with(headers)).await.status, StatusCode::CREATED);
        }
        assert_eq!(runs.get(), 1);
        let warnings = log.lines(&["WARN tower_idempotency"]);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains("anonymous scope"), "{warnings:?}");
    });
}

#[test]
fn authentication_inside_of_the_layer_is_an_error_that_names_the_order() {
    in_a_process_of_its_own(
        "consumers::authentication_inside_of_the_layer_is_an_error_that_names_the_order",
        async {
            let by_closure = ConsumerExtractor::from_fn(|parts| parts.extensions.get::<Consumer>().cloned());
            for extractor in [ConsumerExtractor::extension(), by_closure, ConsumerExtractor::default()] {
                let (log, _guard) = Log::listen();
                let runs = Count::default();
                let counter = runs.clone();
                let app = Router::new()
                    .route("/charges", post(move || async move { counter.add().to_string() }))
                    .layer(middleware::from_fn(authenticate))
                    .layer(layer().with_consumer(extractor));
                for _ in 0..2 {
                    let answer = send(&app, bearer(REFRESHED[0])).await;
                    answer.assert_refused(RejectionCode::ConsumerUnidentified);
                }
                let errors = log.lines(&["ERROR tower_idempotency"]);
                assert_eq!((errors.len(), runs.get()), (1, 0), "{errors:?}");
                assert!(
                    errors[0].contains("authentication layer outside of the idempotency layer"),
                    "{errors:?}"
                );
            }
        },
    );
}

#[test]
fn each_cause_of_a_403_is_logged_once_with_its_remedy() {
    in_a_process_of_its_own("consumers::each_cause_of_a_403_is_logged_once_with_its_remedy", async {
        let (log, _guard) = Log::listen();
        let (app, _) = counting(layer());
        let causes: [(&[(&str, &str)], &str); 4] = [
            (&[("cookie", "AWSALB=secret")], "add_ignored_cookie"),
            (&[("x-api-key", "secret")], "add_ignored_header"),
            (&[("authorization", "Digest secret")], "another ConsumerExtractor"),
            (&[("authorization", "Bearer a"), ("authorization", "Bearer b")], "more than one"),
        ];
        for (headers, _) in causes {
            for _ in 0..2 {
                send(&app, with(headers)).await.assert_refused(RejectionCode::ConsumerUnidentified);
            }
        }
        let errors = log.lines(&["ERROR tower_idempotency"]);
        assert_eq!(errors.len(), causes.len(), "{errors:?}");
        for ((_, remedy), error) in causes.iter().zip(&errors) {
            assert!(error.contains(remedy) && !error.contains("secret"), "{error}");
        }
    });
}

#[tokio::test]
async fn a_load_balancers_cookie_that_is_named_does_not_change_the_consumer() {
    let extractor =
        || ConsumerExtractor::default().add_ignored_cookie("AWSALB").add_ignored_cookie("AWSALBCORS");
    let (app, runs) = counting(layer().with_consumer(extractor()));
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::CREATED);
    assert!(send(&app, with(&[("cookie", "AWSALB=a; AWSALBCORS=b")])).await.is_replay());
    let with_session = with(&[("cookie", "AWSALB=a"), ("cookie", "session=1")]);
    send(&app, with_session).await.assert_refused(RejectionCode::ConsumerUnidentified);
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn a_user_who_is_called_like_a_scope_of_the_crate_does_not_meet_it() {
    let digest = counted_consumer(bearer("t1")).await;
    for (scope, request) in [(Consumer::anonymous(), charge("k")), (digest, bearer("t1"))] {
        let (app, runs) = counting(layer());
        let names = [scope.to_string(), scope.as_str().trim_start_matches('\u{1f}').to_owned()];
        for name in names {
            let named = app.clone().layer(Extension(Consumer::new(name).unwrap()));
            assert!(!send(&named, charge("k")).await.is_replay());
        }
        assert!(!send(&app, request).await.is_replay());
        assert_eq!(runs.get(), 3, "{scope}");
    }
}

/// The consumer of this request, by the default extractor.
async fn counted_consumer(request: Request) -> Consumer {
    let layer = layer();
    let handle = layer.handle();
    send(&counting(layer).0, request).await;
    let records = handle.list(tower_idempotency::store::RecordFilter::All, 10).await.unwrap();
    records[0].consumer.clone()
}

#[tokio::test]
async fn operators_find_the_records_of_the_anonymous_scope_on_sqlite_too() {
    let pool = sqlx::SqlitePool::connect_with(
        sqlx::sqlite::SqliteConnectOptions::new()
            .filename(tempfile::tempdir().unwrap().keep().join("records.sqlite"))
            .create_if_missing(true)
            .journal_mode(sqlx::sqlite::SqliteJournalMode::Wal),
    );
    let pool = pool.await.unwrap();
    for store in [pool.into_store(), MemoryStore::new().into_store()] {
        let layer = IdempotencyLayer::new(store);
        let handle = layer.handle();
        let (app, _) = counting(layer);
        assert_eq!(send(&app, charge("k")).await.status, StatusCode::CREATED);
        let key = IdempotencyKey::new("k").unwrap();
        let record = handle.get(&Consumer::anonymous(), &key).await.unwrap().unwrap();
        assert_eq!(record.consumer, Consumer::anonymous());
        assert!(send(&app, charge("k")).await.is_replay());
        assert!(handle.get(&Consumer::new("anonymous").unwrap(), &key).await.unwrap().is_none());
    }
}

#[tokio::test]
async fn a_client_cannot_send_a_derived_key() {
    let layer = layer().with_derived_key(std::time::Duration::from_secs(60));
    let handle = layer.handle();
    let (app, runs) = counting(layer);
    send(&app, request(axum::http::Method::POST, None, "2000")).await;
    let records = handle.list(tower_idempotency::store::RecordFilter::All, 10).await.unwrap();
    send(&app, charge(records[0].key.as_str())).await.assert_refused(RejectionCode::KeyInvalid);
    assert_eq!(runs.get(), 1);
}

/// Sends a keyed `POST` with the authority and these headers over both versions of HTTP, the second one in lines as
/// HTTP/2 sends them, and returns the answers.
async fn over_both(address: SocketAddr, host: &str, headers: &[(&str, &str)]) -> [(u16, bool, Bytes); 2] {
    let mut answers = Vec::new();
    for http2 in [false, true] {
        let mut client = if http2 { Client::http2(address).await } else { Client::http1(address).await };
        let mut builder = hyper::Request::post(if http2 {
            format!("http://{host}/charges")
        } else {
            "/charges".to_owned()
        });
        if !http2 {
            builder = builder.header("host", host);
        }
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        let request = builder.header("idempotency-key", "k").body(Full::from("2000")).unwrap();
        let (parts, body) = client.send(request).await.into_parts();
        let replayed = parts.headers.contains_key("idempotent-replayed");
        answers.push((parts.status.as_u16(), replayed, body.to_bytes()));
    }
    answers.try_into().unwrap()
}

async fn serve_counting(layer: IdempotencyLayer) -> (SocketAddr, Count) {
    let (app, runs) = counting(layer);
    (serve(app).await, runs)
}

#[tokio::test]
async fn host_counts_in_the_fingerprint_over_http1_and_http2() {
    let layer = layer().with_fingerprint(Fingerprinter::default().add_header(header::HOST));
    let (address, runs) = serve_counting(layer).await;
    let [first, same] = over_both(address, "tenant-a", &[]).await;
    assert_eq!((first.0, same.0, same.1), (201, 201, true), "{same:?}");
    for answer in over_both(address, "tenant-b", &[]).await {
        assert_eq!(answer.0, 422, "{answer:?}");
        assert!(String::from_utf8_lossy(&answer.2).contains("header host"), "{answer:?}");
    }
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn host_names_the_consumer_over_http1_and_http2() {
    let layer = layer().with_consumer(ConsumerExtractor::header(header::HOST));
    let (address, runs) = serve_counting(layer).await;
    for (host, expected) in [("tenant-a", 1), ("tenant-b", 2)] {
        let [_, same] = over_both(address, host, &[]).await;
        assert!(same.1, "{same:?}");
        assert_eq!(runs.get(), expected);
    }
}

#[tokio::test]
async fn cookies_count_in_the_fingerprint_over_http1_and_http2() {
    let ignoring = ConsumerExtractor::default().add_ignored_cookie("a").add_ignored_cookie("b");
    let fingerprinter = Fingerprinter::default().add_header(header::COOKIE);
    let (address, runs) =
        serve_counting(layer().with_consumer(ignoring).with_fingerprint(fingerprinter)).await;
    let [first, _] = over_both(address, "t", &[("cookie", "a=1; b=2")]).await;
    assert_eq!((first.0, first.1), (201, false));
    for answer in over_both(address, "t", &[("cookie", "a=1"), ("cookie", "b=2")]).await {
        assert!(answer.1, "{answer:?}");
    }
    for answer in over_both(address, "t", &[("cookie", "b=2"), ("cookie", "a=1")]).await {
        assert_eq!(answer.0, 422, "{answer:?}");
    }
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn an_absolute_uri_over_http1_counts_as_host() {
    use crate::support::http::exchange;
    let layer = layer().with_fingerprint(Fingerprinter::default().add_header(header::HOST));
    let (address, runs) = serve_counting(layer).await;
    let send = async |target: &str, host: &str| {
        let head = format!(
            "POST {target} HTTP/1.1\r\nhost: {host}\r\nidempotency-key: k\r\ncontent-length: 0\r\n\r\n"
        );
        exchange(address, head).await.status
    };
    assert_eq!(send("/charges", "tenant-a").await, 201);
    assert_eq!(send("http://tenant-a/charges", "tenant-a").await, 201);
    assert_eq!(send("http://tenant-b/charges", "tenant-a").await, 422);
    assert_eq!(send("http://tenant-b/charges", "tenant-b").await, 422);
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn credentials_are_read_alike_over_http1_and_http2() {
    let (address, runs) = serve_counting(layer()).await;
    for headers in [&[("cookie", "a=1"), ("cookie", "b=2")][..], &[("x-merchant-token", "m")]] {
        for answer in over_both(address, "t", headers).await {
            assert_eq!(answer.0, 403, "{answer:?}");
        }
    }
    let [_, same] = over_both(address, "t", &[("authorization", "Bearer t1"), ("cookie", "a=1")]).await;
    assert!(same.1, "{same:?}");
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn the_refusal_of_an_unknown_consumer_says_what_to_do() {
    let (app, _) = counting(layer());
    let answer = send(&app, with(&[("x-api-key", "a")])).await;
    let detail = answer.problem()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("was not performed") && detail.contains("Send the credentials"), "{detail}");
}
