//! Callers whom a header names, and ordinary requests that must not be taken for such.

use axum::{
    extract::Request,
    http::{HeaderName, StatusCode},
};
use tower_idempotency::{Consumer, ConsumerExtractor, store::RecordFilter};

use crate::support::{
    direct::{charge, counting, send},
    served::layer,
};

fn with(headers: &[(&str, &str)]) -> Request {
    let mut request = charge("k");
    for (name, value) in headers {
        request.headers_mut().append(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
    }
    request
}

#[tokio::test]
async fn a_caller_whom_a_gateway_names_never_gets_anothers_response() {
    let names = [
        "x-consumer-id",
        "x-consumer-custom-id",
        "x-forwarded-email",
        "remote-email",
        "x-wsse",
        "x-shopify-hmac-sha256",
        "ssl-client-subject-dn",
        "x-ssl-client-s-dn",
        "x-spiffe-id",
        "x-subject",
        "x-login",
        "x-member-id",
        "x-partner-id",
        "x-saml-name-id",
    ];
    let mut shown = Vec::new();
    for name in names {
        for other in [&[][..], &[("authorization", "Bearer service")]] {
            let (app, _) = counting(layer());
            send(&app, with(&[other, &[(name, "m1")]].concat())).await;
            if send(&app, with(&[other, &[(name, "m2")]].concat())).await.is_replay() {
                shown.push(name);
            }
        }
    }
    assert!(shown.is_empty(), "{shown:?}");
}

#[tokio::test]
async fn headers_of_browsers_and_proxies_are_no_credentials() {
    let names = [
        "x-appengine-user-ip",
        "requestverificationtoken",
        "x-antiforgery-token",
        "x-anti-forgery-token",
        "x-csrftoken",
        "x-idempotency-key",
        "accept-signature",
        "x-recaptcha-token",
        "x-forwarded-for",
        "cf-ray",
        "x-amzn-trace-id",
        "x-envoy-expected-rq-timeout-ms",
        "x-b3-traceid",
        "x-cloud-trace-context",
        "x-user-agent",
        "x-requested-with",
        "x-tenant",
        "x-datadog-origin",
    ];
    let mut refused = Vec::new();
    for name in names {
        for other in [&[][..], &[("authorization", "Bearer service")]] {
            let (app, _) = counting(layer());
            let answer = send(&app, with(&[other, &[(name, "1")]].concat())).await;
            if answer.status != StatusCode::CREATED {
                refused.push(name);
            }
        }
    }
    assert!(refused.is_empty(), "{refused:?}");
}

#[tokio::test]
async fn the_key_of_another_layer_is_no_credential() {
    let other = layer().with_key_header(HeaderName::from_static("x-operation"));
    let (app, runs) = counting(other);
    let app = app.layer(layer().with_consumer(ConsumerExtractor::shared(Consumer::anonymous())));
    let request = || with(&[("x-operation", "inner")]);
    assert_eq!(send(&app, request()).await.status, StatusCode::CREATED);
    assert!(send(&app, request()).await.is_replay());
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn a_credential_that_names_the_consumer_is_not_stored() {
    for name in ["x-api-key", "authorization", "cookie"] {
        let layer = layer().with_consumer(ConsumerExtractor::header(HeaderName::from_static(name)));
        let handle = layer.handle();
        let (app, runs) = counting(layer);
        for (value, replays) in [("sk_live_a", false), ("sk_live_a", true), ("sk_live_b", false)] {
            assert_eq!(send(&app, with(&[(name, value)])).await.is_replay(), replays, "{name} {value}");
        }
        assert_eq!(runs.get(), 2);
        for record in handle.list(RecordFilter::All, 10).await.unwrap() {
            assert!(!record.consumer.as_str().contains("sk_live"), "{record:?}");
            assert!(Consumer::new(record.consumer.as_str()).is_err());
        }
    }
}
