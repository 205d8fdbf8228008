//! The wait for a destination that fetches images.

use super::*;
use crate::{
    fixtures,
    model::{HeldImage, ImagePhase},
    state::Hooks,
    store::memory::Disk,
};

#[tokio::test]
async fn the_wait_for_a_destination_begins_anew_only_while_its_copy_gets_on() {
    let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
    let vm = fixtures::vm_of(&fixtures::image("12", 1), "web", "h1");
    let record = MigrationRecord {
        phase: Phase::PreparingDestination,
        ..fixtures::migration(&vm, "h2")
    };
    let h2 = fixtures::host_name("h2");
    let begin = record.phase_time;
    db.change(|tx| {
        for host in ["h1", "h2"] {
            tx.put_host(fixtures::host(host));
            let live = crate::model::HostLive::silent(tokio::time::Instant::now());
            tx.set_live(fixtures::host_name(host), live);
        }
        tx.put_vm(vm.clone());
        tx.put_migration(record.clone());
    })
    .await;
    let come = async |bytes: u64| {
        let mut held = fixtures::held(ImagePhase::Fetching);
        held.bytes_done = bytes;
        db.change(|tx| tx.note_held(&h2, HeldImage::Copy(fixtures::digest(1), held)))
            .await;
        assert!(matches!(fetching(&db, &vm, &record).await, Next::After(_)));
        db.snapshot().migrations[&record.id].phase_time
    };
    let first = come(10).await;
    assert!(first > begin, "it fetches");
    // As if that had been long ago.
    db.change(|tx| tx.put_migration(record.clone())).await;
    assert_eq!(come(10).await, begin, "nothing has come since");
    assert!(come(11).await > begin);
}
