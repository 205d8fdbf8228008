//! `dalgu explain`: why a VM is where it is, where it could go, where a new one would go.

use dalgu_proto::v1;
use v1::explain_placement_request::Subject;

use super::{Session, spec};
use crate::{
    args::vm::ExplainArgs,
    exit::Error,
    output::{Format, explain, json},
};

/// Asks and shows.
pub async fn run(args: ExplainArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let (subject, verb, placement) = match (&args.vm, args.move_ || args.host.is_some()) {
        (Some(vm), false) => {
            let request = v1::GetPlacementRequest { vm: vm.clone() };
            let placement = session
                .read(async |client| client.placement().get_placement(request.clone()).await)
                .await?;
            (vm.as_str(), "is on", placement)
        }
        (Some(vm), true) => (
            vm.as_str(),
            "would migrate to",
            ask(Subject::Vm(vm.clone()), &args, session).await?,
        ),
        (None, _) if args.spec.disks.is_empty() && args.spec.kernel.is_none() && args.spec.file.is_none() => {
            return Err(Error::Usage(
                "name a VM (`dalgu explain web`), or describe a new one with at least a --disk, a --kernel or a --file"
                    .to_owned(),
            ));
        }
        (None, _) => {
            let subject = Subject::Spec(spec::of(&args.spec)?);
            ("a new VM", "would go to", ask(subject, &args, session).await?)
        }
    };
    let text = match session.format {
        Format::Json => json::object(&placement)?,
        Format::Yaml => json::yaml(&placement)?,
        Format::Name => format!("{}\n", placement.host),
        Format::Table | Format::Wide => explain::render(&placement, subject, verb, session.term.color),
    };
    Ok(session.term.print(&text)?)
}

async fn ask(subject: Subject, args: &ExplainArgs, session: &Session<'_>) -> Result<v1::Placement, Error> {
    let host = args.host.clone().unwrap_or_default();
    let request = v1::ExplainPlacementRequest {
        subject: Some(subject),
        host,
        placement_groups: args.placement.groups.clone(),
        tolerations: args.placement.tolerations.clone(),
        ignore_protection: args.ignore_protection,
    };
    session
        .read(async |client| client.placement().explain_placement(request.clone()).await)
        .await
}
