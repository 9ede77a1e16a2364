//! The table `inet weft` is kept as it should be, and no more of it is touched than must be.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use weft_core::model::{EndpointId, Label, Proto};
use weft_core::view::{Endpoint, EndpointKind, Method, Service, ServicePort, View};
use weft_kernel::Rules;
use weft_kernel::filter::{Guard, domain_filter, host_filter};
use weft_kernel::nft::{self, Where};

use crate::lab::{Lab, on_a_host, sh};

const CHAIN: &str = "chain test_in { type filter hook input priority filter; policy accept;
  ip daddr @test_hosts counter
  counter
}";

fn hosts(elements: &str) -> String {
    format!("set test_hosts {{ type ipv4_addr; elements = {{ {elements} }}; }}")
}

/// The table with the handle of each rule.
fn listed() -> String {
    sh("nft -a list table inet weft")
}

#[test]
fn what_somebody_took_away_or_changed_is_put_again() {
    on_a_host(|lab| {
        let place = Where::Host(&lab.host);
        let mut rules = Rules::default();
        assert!(!rules.stand(place));
        let hosts = hosts("192.0.2.1");
        rules.keep(place, &[&hosts, CHAIN]).unwrap();
        assert!(rules.stand(place));
        let handle = |text: &str| {
            let listed = listed();
            let line = listed.lines().find(|line| line.contains(text)).unwrap();
            line.rsplit(' ').next().unwrap().to_owned()
        };
        let whose = handle("@test_hosts counter");
        for damage in [
            "delete element inet weft test_hosts '{ 192.0.2.1 }'".to_owned(),
            "add element inet weft test_hosts '{ 192.0.2.9 }'".to_owned(),
            "flush ruleset".to_owned(),
            "flush table inet weft".to_owned(),
            format!("delete rule inet weft test_in handle {whose}"),
            "add rule inet weft test_in drop".to_owned(),
        ] {
            let damage = damage.replace(&whose, &handle("@test_hosts counter"));
            sh(&format!("nft {damage}"));
            assert!(!rules.stand(place), "{damage}");
            rules.keep(place, &[&hosts, CHAIN]).unwrap();
            assert!(rules.stand(place), "{damage}");
            let text = listed();
            let whole = text.contains("@test_hosts") && text.contains("{ 192.0.2.1 }");
            assert!(whole && !text.contains("drop"), "{text}");
        }
        let refused = rules.keep(place, &["chain x { nonsense }"]);
        assert!(refused.unwrap_err().to_string().contains("nonsense"));
        assert!(listed().contains("@test_hosts"), "what stood stands");
        rules.keep(place, &[&hosts, CHAIN]).unwrap();
        nft::remove(place).unwrap();
        nft::remove(place).unwrap();
    });
}

#[test]
fn a_change_leaves_what_it_does_not_concern() {
    on_a_host(|lab| {
        let place = Where::Host(&lab.host);
        let mut rules = Rules::default();
        rules.keep(place, &[&hosts("192.0.2.1"), CHAIN]).unwrap();
        sh("ping -n -c1 -W2 127.0.0.1");
        let before = listed();
        let counting = |text: &str| {
            let chain = text.split("chain test_in").nth(1).unwrap().to_owned();
            chain.split_once('}').unwrap().0.to_owned()
        };
        let all = counting(&before).trim().lines().last().unwrap().to_owned();
        assert!(!all.contains("packets 0"), "{all}");
        let more = format!(
            "{}\nmap test_to {{ type inet_service : verdict; elements = {{ 80 : goto test_web }}; }}\nchain test_web {{ accept }}",
            hosts("192.0.2.2, 192.0.2.3")
        );
        rules.keep(place, &[&more, CHAIN]).unwrap();
        let after = listed();
        assert_eq!(counting(&before), counting(&after), "handles and counters");
        assert!(
            after.contains("192.0.2.3") && !after.contains("192.0.2.1 "),
            "{after}"
        );
        assert!(after.contains("80 : goto test_web"), "{after}");
        // Somebody took an element away: the whole is put.
        sh("nft delete element inet weft test_hosts '{ 192.0.2.2 }'");
        assert!(!rules.stand(place));
        rules.keep(place, &[&hosts("192.0.2.9"), CHAIN]).unwrap();
        let text = listed();
        assert!(
            text.contains("192.0.2.9") && !text.contains("test_web"),
            "{text}"
        );
        assert_ne!(counting(&before), counting(&text));
    });
}

fn container(view: &View, last: u8) -> Endpoint {
    Endpoint {
        id: EndpointId([last; 8]),
        node: view.me,
        kind: EndpointKind::Container,
        names: vec![Label::parse("web").unwrap()],
        network: Label::parse("default").unwrap(),
        ip: Ipv4Addr::new(10, 32, 0, last),
        labels: BTreeMap::new(),
    }
}

fn service(last: u8) -> Service {
    Service {
        name: Label::parse("web").unwrap(),
        vip: Ipv4Addr::new(10, 47, 0, last),
        ports: vec![ServicePort {
            proto: Proto::Tcp,
            port: 80,
            target: 8080,
            publish: Vec::new(),
        }],
        selector: BTreeMap::new(),
        method: Method::Maglev,
    }
}

/// Both tables, with the handle of each rule, as the daemon has them kept.
fn keep(lab: &Lab, [domain, host]: &mut [Rules; 2]) -> [String; 2] {
    let facts = weft_lb::LocalFacts {
        ipv6: true,
        ..weft_lb::LocalFacts::default()
    };
    let balance = weft_lb::plan(&lab.view, &facts);
    let filter = domain_filter(&lab.view, &lab.local, None);
    let services = weft_lb::domain_fragment(&balance);
    let place = Where::Domain(lab.domain());
    domain.keep(place, &[&filter, &services]).unwrap();
    let filter = host_filter(&lab.view, &lab.local, Guard::default());
    let published = weft_lb::host_fragment(&balance);
    let place = Where::Host(&lab.host);
    host.keep(place, &[&filter, &published]).unwrap();
    [lab.in_domain("nft -a list table inet weft"), listed()]
}

/// The lines of rules, with their handles, of chains with these names.
fn rules_of(listed: &str, is_wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let mut wanted = false;
    let mut rules = Vec::new();
    for line in listed.lines().map(str::trim) {
        match line.split_once(' ') {
            Some(("chain", rest)) => wanted = rest.split(' ').next().is_some_and(&is_wanted),
            Some(("set" | "map" | "table", _)) | None => wanted = false,
            Some(_) if wanted => rules.push(line.to_owned()),
            Some(_) => {}
        }
    }
    rules
}

#[test]
fn a_backend_more_lays_the_chain_of_its_service_and_no_other() {
    on_a_host(|lab| {
        let mut rules = [Rules::default(), Rules::default()];
        lab.view.endpoints = vec![container(&lab.view, 10)];
        lab.view.services = vec![service(9)];
        let before = keep(lab, &mut rules);
        lab.view.endpoints.push(container(&lab.view, 11));
        lab.view.services.push(service(10));
        let after = keep(lab, &mut rules);
        assert_eq!(before[1], after[1], "nothing of it concerns the host");
        let is_common = |name: &str| !name.starts_with("lb_10_47");
        let (old, new) = (
            rules_of(&before[0], is_common),
            rules_of(&after[0], is_common),
        );
        assert!(old.len() > 40, "{old:?}");
        assert_eq!(old, new);
        let of = |listed: &str, last: u8| {
            rules_of(listed, |name| name == format!("lb_10_47_0_{last}_tcp_80"))
        };
        assert!(!of(&before[0], 9).is_empty() && !of(&after[0], 10).is_empty());
        assert_ne!(of(&before[0], 9), of(&after[0], 9));
        lab.view.services.remove(0);
        let fewer = keep(lab, &mut rules);
        assert!(of(&fewer[0], 9).is_empty());
        assert_eq!(of(&fewer[0], 10), of(&after[0], 10));
    });
}
