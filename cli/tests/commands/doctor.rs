//! `dalgu doctor`.

use dalgu_proto::v1;
use v1::FindingSeverity as Severity;

use super::common::{Controller, ago};

fn diagnosis(severities: &[Severity], gaps: usize) -> v1::Diagnosis {
    let finding = |severity: &Severity| v1::Finding {
        invariant: "I4".into(),
        severity: (*severity).into(),
        kind: "STRAY_VM".into(),
        subject: "vm old".into(),
        seen: "h2 has it".into(),
        next_step: "look at it".into(),
    };
    v1::Diagnosis {
        time: ago(1),
        resource_version: 7,
        findings: severities.iter().map(finding).collect(),
        checks: vec![],
        gaps: vec![v1::DiagnosisGap::default(); gaps],
    }
}

#[tokio::test]
async fn the_exit_code_is_0_only_where_nothing_is_wrong_and_every_host_was_seen() {
    let controller = Controller::start();
    for (severities, gaps, code, verdict) in [
        (&[][..], 0, 0, ""),
        (&[Severity::Notice][..], 0, 0, ""),
        (&[Severity::Warning][..], 0, 9, "error: found 1 warning\n"),
        (
            &[Severity::Critical, Severity::Warning, Severity::Warning][..],
            1,
            9,
            "error: found 1 critical, 2 warnings; not seen: 1 host\n",
        ),
        (&[Severity::Unspecified][..], 0, 9, "error: found 1 other\n"),
        (&[][..], 2, 9, "error: not seen: 2 hosts\n"),
    ] {
        controller
            .fake
            .script()
            .diagnoses
            .push_back(Ok(diagnosis(severities, gaps)));
        let outcome = controller.run(&["doctor"]).await;
        assert_eq!(
            (outcome.code, outcome.err.as_str()),
            (code, verdict),
            "{severities:?} {gaps}"
        );
        assert!(outcome.out.contains("Found:"), "{}", outcome.out);
    }
}

#[tokio::test]
async fn it_is_shown_in_every_form_and_the_database_is_looked_through_when_that_is_asked() {
    let controller = Controller::start();
    for _ in 0..3 {
        let found = diagnosis(&[Severity::Warning], 0);
        controller.fake.script().diagnoses.push_back(Ok(found));
    }
    let json = controller.run(&["doctor", "--deep", "-o", "json"]).await;
    assert!(
        json.out.contains("\"severity\": \"FINDING_SEVERITY_WARNING\""),
        "{}",
        json.out
    );
    let yaml = controller.run(&["doctor", "-o", "yaml"]).await;
    assert!(yaml.out.contains("nextStep: look at it"), "{}", yaml.out);
    let names = controller.run(&["doctor", "-o", "name"]).await;
    assert_eq!((names.code, names.out.as_str()), (9, "STRAY_VM vm old\n"));
    assert_eq!(
        controller.fake.script().seen,
        ["get_diagnosis true", "get_diagnosis false", "get_diagnosis false"]
    );
}
