//! A site as a file declares it, on a real host: made, found as declared, changed in one run with a volume that grows under its
//! VM, emptied of rules, and had back where something was deleted.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::fs;

use anyhow::ensure;
use dalgu_tests::e2e;
use dalgu_tests::e2e::words::{self, Ended, dalgu, json, number_at, try_dalgu};
use dalgu_tests::lab::{Lab, guest, with_lab};

/// The site: rules of the group `web`, more groups, the volume's size, the VM's processors.
fn site(rules: &str, groups: &str, size_mib: u64, vcpus: u32) -> String {
    let (kernel, initrd, cmdline) = (guest::KERNEL, guest::INITRD, guest::CMDLINE);
    format!(
        "
securityGroups:
- {{name: web, rules: {rules}}}
{groups}
networks:
- {{name: field, overlay: {{}}, ipv4: {{cidr: 10.20.0.0/24}}}}
volumes:
- {{name: ledger, sizeMib: {size_mib}}}
- {{name: spare, sizeMib: 8, description: ''}}
placementGroups:
- {{name: apart, rule: PLACEMENT_RULE_ANTI_AFFINITY, topologyKey: '', preferred: false}}
vms:
- name: shop
  labels: {{cpus: '{vcpus}'}}
  placementGroups: [apart]
  spec:
    vcpus: {vcpus}
    memoryMib: 96
    maxVcpus: 0
    kernelBoot: {{kernel: {kernel}, initrd: {initrd}, cmdline: '{cmdline}'}}
    disks: [{{name: root, sizeMib: 8, limits: {{}}}}, {{name: data, volume: ledger, sizeMib: 0}}]
    nics: [{{name: eth0, network: field, mac: '', securityGroups: [web], sendLimitMbitPerSecond: 0}}]
"
    )
}

/// Applies a file; whether it ends well is the caller's to say.
async fn apply(lab: &Lab, text: &str) -> anyhow::Result<Ended> {
    let file = lab.layout().dir().join("site.yaml");
    fs::write(&file, text)?;
    try_dalgu(lab, &["apply", "--yes", "-f", &file.to_string_lossy()]).await
}

/// That nothing was to be done. Answers what was said besides.
async fn is_as_declared(lab: &Lab, text: &str, objects: usize) -> anyhow::Result<String> {
    let again = apply(lab, text).await?;
    let wanted = format!("0 to make, 0 to change, {objects} as declared");
    ensure!(
        again.code == 0 && again.stdout.is_empty() && again.stderr.contains(&wanted),
        "{again:?}"
    );
    Ok(again.stderr)
}

const PORT: &str = "[{direction: DIRECTION_INGRESS, protocol: PROTOCOL_TCP, firstPort: 443}]";
/// The second group comes to name the third, which is not there at first.
const GROUPS: &str = "\
- {name: db, rules: [{direction: DIRECTION_INGRESS, protocol: PROTOCOL_TCP, firstPort: 5432, group: desk}]}
- {name: desk}";
/// What is said of a VM that runs with less than it is to have.
const PENDING: &str = "pending: vcpus is 1, to be 2: ";

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_site_becomes_what_its_file_declares_in_one_run_and_stays_so() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let first = site(PORT, "- {name: db, rules: []}", 32, 1);
        let made = apply(lab, &first).await?;
        ensure!(made.code == 0 && made.stderr.contains("7 to make"), "{made:?}");
        is_as_declared(lab, &first, 7).await?;
        let apart = json(lab, &["placement-group", "get", "apart"]).await?;
        ensure!(apart["vms"][0] == "shop", "{apart}");
        let before = words::vm(lab, "shop").await?;
        ensure!(before.state == "RUNNING", "{}", before.all);

        let second = site("[]", GROUPS, 64, 2);
        let changed = apply(lab, &second).await?;
        ensure!(changed.code == 0, "{changed:?}");
        ensure!(
            changed.stderr.contains("1 to make, 4 to change, 3 as declared"),
            "{changed:?}"
        );
        ensure!(changed.stderr.contains(PENDING), "{changed:?}");
        let web = json(lab, &["security-group", "show", "web"]).await?;
        ensure!(web.get("rules").is_none(), "{web}");
        let db = json(lab, &["security-group", "show", "db"]).await?;
        ensure!(db["rules"][0]["group"] == "desk", "{db}");
        let ledger = json(lab, &["volume", "show", "ledger"]).await?;
        ensure!(number_at(&ledger, "/sizeMib") == 64, "{ledger}");
        let shop = words::vm(lab, "shop").await?;
        ensure!(shop.uid == before.uid && shop.vcpus == 2, "{}", shop.all);
        ensure!(shop.all["labels"]["cpus"] == "2", "{}", shop.all);
        ensure!(
            number_at(&shop.all, "/spec/disks/1/sizeMib") == 64,
            "{}",
            shop.all
        );
        let said = is_as_declared(lab, &second, 8).await?;
        ensure!(said.contains(PENDING), "{said}");

        // One field of what is there is enough.
        let one = "volumes: [{name: ledger, description: books}]\nvms: [{name: shop, spec: {restartPolicy: RESTART_POLICY_ALWAYS}}]\n";
        let changed = apply(lab, one).await?;
        ensure!(changed.code == 0 && changed.stderr.contains("0 to make, 2 to change"), "{changed:?}");
        is_as_declared(lab, one, 2).await?;
        let shop = words::vm(lab, "shop").await?;
        ensure!(shop.vcpus == 2 && shop.all["spec"]["restartPolicy"] == "RESTART_POLICY_ALWAYS", "{}", shop.all);
        is_as_declared(lab, &second, 8).await?;

        dalgu(lab, &["volume", "delete", "spare"]).await?;
        let back = apply(lab, &second).await?;
        ensure!(
            back.code == 0 && back.stdout.contains("~ volume spare\n  - deleteTime: "),
            "{back:?}"
        );
        let spare = json(lab, &["volume", "show", "spare"]).await?;
        ensure!(spare["status"]["state"] == "VOLUME_STATE_NEW", "{spare}");
        is_as_declared(lab, &second, 8).await?;
        Ok(())
    })
    .await
}
