"""The phrases of which `builtin.py` composes its invented notes: a table to read, not code to run.

It is one long Python module, not package data, so that it ships with any build backend, and a reader sees the
training, validation and test cases of a specialty side by side: no case, no plan and no generic line stands in two
pools. All of it was made up for medlit; none of it comes from a patient or a published note.

How to read `CASES[specialty][pool]`: three lines are one case, `complaint; diagnosis`, `finding; procedure` and `plan`.
In every phrase `{left|right}` is a choice, `{20-35}` a whole number and `{0.6-0.9}` a number with one decimal.
Complaints are noun phrases (they follow "presents with").
No phrase may hold a stem of a specialty's name: `tests/test_builtin.py` lists them.
"""

from __future__ import annotations

CASES: dict[str, dict[str, str]] = {
    "Cardiovascular / Pulmonary": {
        "train": """
            crushing substernal chest pain radiating to the left arm; acute inferior myocardial infarction
            ST elevation in leads II, III and aVF, troponin {2.1-9.8}; cardiac catheterization with coronary stent
            aspirin, metoprolol and atorvastatin, cardiac rehabilitation
            exertional dyspnea, orthopnea and ankle swelling; congestive heart failure
            ejection fraction {20-35} percent, bibasilar crackles, S3 gallop; transthoracic echocardiogram with Doppler
            furosemide {20|40|80} mg daily, low-salt diet and daily weights
            palpitations and an irregular heartbeat; atrial fibrillation with rapid ventricular rate
            irregularly irregular rhythm at {118-150} without murmur; synchronized cardioversion at {100|150|200} joules
            anticoagulation with apixaban, telemetry overnight
            fatigue and near syncope on the stairs; severe calcific aortic stenosis
            harsh systolic murmur, aortic valve area {0.6-0.9} cm2; valve replacement, {21|23|25} mm tissue valve
            repeat echocardiogram in {3-6} months, no diuretics
            productive cough and wheezing after {30-60} pack-years; exacerbation of chronic obstructive lung disease
            prolonged expiration with wheezes, FEV1 {32-48} percent of predicted; spirometry before and after albuterol
            inhaled steroid, home oxygen at {2-4} liters, stop smoking
            cramping calf pain after walking {1-3} blocks; peripheral arterial disease of the {left|right} leg
            diminished pedal pulses, ankle-brachial index low; femoral popliteal bypass with saphenous vein graft
            clopidogrel, walking program, foot pulses each visit
            dizzy spells with a pulse in the thirties; complete heart block
            P waves dissociated from the QRS, rate {30-38}; dual-chamber pacemaker by the subclavian vein
            pacemaker check in {2-4} weeks, chest film for lead position
            shortness of breath and cough for {1-3} weeks; recurrent pleural effusion
            no breath sounds at the {left|right} base, saturation {86-91} percent; thoracentesis of {600-1500} mL
            chest film, fluid for cytology, albuterol as needed
        """,
        "validation": """
            tearing chest pain through to the shoulder blades; descending aortic dissection
            unequal arm pulses and an aortic murmur, normal troponin; endovascular stent graft of the thoracic aorta
            esmolol to keep the systolic pressure under 120
            rusty sputum, fever and breathlessness; lobar pneumonia
            bronchial breath sounds and egophony over the {left|right} lower lobe; bronchoscopy with lavage
            ceftriaxone with azithromycin, incentive spirometer
            fluttering in the chest and lightheadedness; supraventricular tachycardia
            narrow-complex rhythm at {160-190} broken by adenosine; radiofrequency ablation of the slow pathway
            diltiazem drip and serial cardiac enzymes
        """,
        "test": """
            pleuritic chest pain and sudden dyspnea after a long flight; saddle embolus of the lung arteries
            right ventricular strain on echocardiogram, saturation {84-89} percent; catheter-directed thrombolysis
            heparin infusion, then rivaroxaban for {3-6} months, oxygen
            angina at rest despite nitroglycerin; triple-vessel coronary disease
            {70-95} percent stenosis of the left anterior descending; coronary bypass with mammary artery conduit
            statin, aspirin and a treadmill stress test
            breathlessness when lying flat; mitral regurgitation with a flail leaflet
            holosystolic murmur at the apex, dilated left atrium; mitral valve repair with an annuloplasty ring
            lisinopril, furosemide, echocardiogram before discharge
            syncope and palpitations on exertion; hypertrophic cardiomyopathy
            thick septum on echocardiogram, harsh systolic murmur; implantable defibrillator
            metoprolol titrated upward, Holter monitor for {24-48} hours
        """,
    },
    "Orthopedic": {
        "train": """
            knee giving way since a twisting injury at soccer; anterior cruciate ligament tear
            positive Lachman test, effusion of the {left|right} knee; arthroscopic reconstruction with hamstring graft
            knee brace locked in extension, crutches for {2-4} weeks
            hip pain and inability to bear weight after a fall; displaced femoral neck fracture
            {left|right} leg shortened and externally rotated; hip hemiarthroplasty through a posterior approach
            weight bearing as tolerated with a walker, hip precautions
            shoulder pain with overhead reaching; full-thickness rotator cuff tear
            weak supraspinatus, abduction to {60-95} degrees; arthroscopic rotator cuff repair with suture anchors
            sling, ice and gentle pendulum exercises
            numb thumb and index finger at night; {left|right} carpal tunnel syndrome
            positive Tinel and Phalen signs at the wrist; open carpal tunnel release under tourniquet
            wrist splint at night, hand therapy, sutures out in {10-14} days
            years of grinding knee pain worse on stairs; end-stage osteoarthritis of the {left|right} knee
            varus deformity, crepitus, flexion to {95-115} degrees; total knee arthroplasty with cemented components
            physical therapy for knee motion and quadriceps strengthening
            ankle deformity after slipping on ice; bimalleolar ankle fracture
            fracture blisters, toes warm; open reduction and internal fixation with plate and screws
            nonweightbearing in a splint for {4-8} weeks, x-rays of the hardware
            a finger that locks in flexion; trigger finger of the {left|right} hand
            palpable nodule with catching at the tendon sheath; pulley release under tourniquet
            finger motion at once, dressing off in {2-4} days
            heel pain with the first steps of the morning; plantar fasciitis
            point tenderness at the calcaneus, tight calf; steroid injection of the plantar fascia
            calf stretching, heel cups, no running
        """,
        "validation": """
            a loud pop behind the ankle during basketball; Achilles tendon rupture
            palpable gap and positive Thompson squeeze; open repair of the tendon with locking suture
            boot with heel lift, then eccentric strengthening
            painful bunion in tight shoes; hallux valgus deformity
            great toe deviated {28-40} degrees, tender joint; metatarsal osteotomy with screw fixation
            stiff-soled shoe and toe spacer
            thigh deformity after a motorcycle crash; femoral shaft fracture
            unstable swollen thigh, compartments soft; intramedullary nailing with interlocking screws
            enoxaparin and toe-touch weight bearing
        """,
        "test": """
            wrist pain after falling on an outstretched hand; comminuted distal radius fracture
            dinner-fork deformity, fingers move well; volar plate fixation with locking screws
            cast for {4-6} weeks with finger motion and elevation
            clicking and locking on the inner side of the knee; bucket-handle meniscus tear
            joint line tenderness, positive McMurray maneuver; arthroscopic partial meniscectomy
            hinged brace, anti-inflammatory tablets, early knee motion
            groin pain and stiffness when tying shoes; avascular necrosis of the femoral head
            internal rotation of the hip limited to {5-15} degrees; total hip replacement with a press-fit stem
            gait training with a walker, partial weight bearing
            elbow pain when gripping a racket; lateral epicondylitis
            tender extensor origin, pain on resisted wrist extension; tendon debridement at the elbow
            forearm strap, stretching and a cortisone shot
        """,
    },
    "Neurology": {
        "train": """
            staring spells with lip smacking; complex partial seizures
            sharp waves over the {left|right} temporal leads; routine EEG with photic stimulation
            levetiracetam {500|750|1000} mg twice daily, no driving
            throbbing one-sided headache with visual aura; migraine
            normal fundi and no focal deficit between attacks; EEG to exclude seizures
            sumatriptan at onset, topiramate for prevention, headache diary
            resting tremor and shuffling gait; Parkinson disease
            cogwheel rigidity, masked facies, reduced arm swing; levodopa challenge with timed gait
            carbidopa-levodopa three times a day, gait therapy
            sudden right-sided weakness and slurred speech; acute left middle cerebral artery stroke
            NIH stroke scale {6-18}, facial droop, arm drift; transcranial Doppler after tissue plasminogen activator
            aspirin and clopidogrel, swallow study, stroke unit
            burning numbness in both feet; diabetic polyneuropathy
            absent ankle reflexes, reduced vibration sense; nerve conduction study and EMG of the legs
            gabapentin at night, foot care, check B12
            blurred vision, then leg numbness months later; relapsing multiple sclerosis
            periventricular plaques, oligoclonal bands in the spinal fluid; lumbar puncture
            interferon injections, MRI of the brain and cord in {6-12} months
            forgetfulness and getting lost while driving; Alzheimer dementia
            mental status score {17-23} of 30, delayed recall zero of three; memory testing battery
            donepezil, caregiver support, no driving
            drooping eyelids and tiring while chewing; myasthenia gravis
            ptosis after sustained upgaze, fatigable neck flexors; repetitive nerve stimulation
            pyridostigmine {30|60} mg, chest CT for thymoma
        """,
        "validation": """
            dancing movements of the arms and unsteady gait; Huntington disease
            chorea, slow saccades, memory recall two of three; blood test for CAG repeats
            tetrabenazine and genetic counseling
            sleep attacks and knees buckling with laughter; narcolepsy with cataplexy
            reflexes normal, dreams within {2-5} minutes of sleep; overnight EEG and sleep latency test
            modafinil in the morning, scheduled naps
            facial droop on waking; Bell palsy
            weak {left|right} forehead, no arm weakness, speech clear; EMG of the facial muscles
            prednisone for {7-10} days, eye patch
        """,
        "test": """
            weakness climbing from the feet after diarrhea; Guillain-Barre syndrome
            absent reflexes in the legs, spinal fluid protein {90-180}; nerve conduction study, immunoglobulin infusion
            vital capacity every {4-6} hours, watch reflexes
            convulsive seizures on waking; generalized epilepsy
            spikes and sharp waves at {3-5} hertz; sleep-deprived EEG
            lamotrigine slowly increased, seizure precautions
            wasting of the hands with twitching and slurred speech; amyotrophic lateral sclerosis
            tongue fasciculations, brisk reflexes, Babinski sign; needle EMG of four limbs
            riluzole, speech therapy, breathing test every {2-4} months
            loss of speech that lasted {10-40} minutes; transient ischemic attack
            speech fluent again, no drift, gait steady; carotid duplex and stroke work-up
            clopidogrel, statin and blood pressure control to prevent stroke
        """,
    },
    "Gastroenterology": {
        "train": """
            painless rectal bleeding; descending colon polyp
            pedunculated polyp at {30-60} cm, cecum reached; colonoscopy with snare polypectomy
            high-fiber diet, repeat colonoscopy in {3-5} years
            heartburn and regurgitation at night; reflux esophagitis
            erosions of the distal esophagus, small hiatal hernia; upper endoscopy with biopsies of the esophagus
            omeprazole {20|40} mg twice daily, no late meals
            right upper quadrant pain after fatty meals; symptomatic gallstones
            positive Murphy sign, thickened gallbladder wall; laparoscopic cholecystectomy
            clear liquids, then a low-fat diet, liver enzymes in a week
            black tarry stools while taking ibuprofen; bleeding duodenal ulcer
            visible vessel at an ulcer base in the duodenal bulb; endoscopy with epinephrine injection and clips
            stop ibuprofen, test for Helicobacter, pantoprazole drip
            swollen abdomen and confusion in a heavy drinker; alcoholic cirrhosis with ascites
            shifting dullness, spider angiomata, bilirubin {3.1-7.9}; paracentesis with {3-8} liters removed
            spironolactone, hepatitis panel, stop alcohol
            bloody diarrhea with cramps and urgency; ulcerative colitis
            friable granular mucosa from the rectum upward; flexible sigmoidoscopy with biopsies
            mesalamine enemas and stool cultures
            pain moving from the navel to the right lower quadrant; acute appendicitis
            rebound tenderness at McBurney point, white count {13-19} thousand; laparoscopic appendectomy
            antibiotics until the abdomen is soft and bowel sounds return
            a reducible bulge in the groin on straining; {left|right} inguinal hernia
            bowel in the hernia sac, easily reduced; hernia repair with mesh
            stool softener, no lifting over {10|15|20} pounds
        """,
        "validation": """
            vomiting bright red blood, known cirrhosis; bleeding esophageal varices
            three columns in the lower esophagus with red wale marks; upper endoscopy with band ligation
            octreotide drip, nadolol, lactulose
            lower quadrant pain, cramps and constipation; sigmoid diverticulitis
            rebound and guarding on the left, white count {12-16} thousand; sigmoid colectomy
            ciprofloxacin with metronidazole, bowel rest
            diarrhea, cramps and a perianal fistula; Crohn disease
            cobblestone mucosa of the terminal ileum; colonoscopy with ileal biopsies
            infliximab infusions, nutrition consult
        """,
        "test": """
            food sticking behind the breastbone; peptic stricture of the esophagus
            narrow ring at {34-38} cm with Barrett mucosa; endoscopy with balloon dilation
            omeprazole before breakfast, endoscopy again in {4-8} weeks
            jaundice and clay-colored stools; common bile duct stone
            dilated duct with a gallstone, bilirubin {6.1-9.9}; endoscopy of the bile duct with sphincterotomy
            trend liver tests, gallbladder removal before discharge
            epigastric pain boring to the back after alcohol; acute pancreatitis
            lipase {900-3200}, tender upper abdomen, quiet bowel; endoscopic drainage of a pseudocyst
            nothing by mouth, fluids, no alcohol
            bloating and loose stools after bread; celiac disease
            scalloped folds of the duodenum; endoscopy with duodenal biopsies
            gluten-free diet, recheck antibodies, bowel diary
        """,
    },
    "Obstetrics / Gynecology": {
        "train": """
            regular contractions and leaking fluid at {38-41} weeks; term pregnancy in active labor
            cervix {5-8} cm dilated, fetal heart tones {130-150}; spontaneous vaginal delivery, second-degree repair
            breastfeeding support and a postpartum visit
            no progress after {12-20} hours of labor; cephalopelvic disproportion
            fetal head at 0 station with caput; primary low transverse cesarean section
            prophylactic antibiotics, mother and baby to recovery
            heavy menstrual bleeding with clots; uterine fibroids
            uterus enlarged to {12-18} weeks size, hemoglobin {8.1-9.9}; total abdominal hysterectomy
            iron tablets, pelvic rest for six weeks
            request for permanent contraception; multiparity, completed childbearing
            normal uterus, tubes and ovaries; laparoscopic tubal ligation
            contraception until the first normal period
            spotting and pelvic pain at {6-8} weeks; ruptured ectopic pregnancy
            blood in the cul-de-sac, {left|right} tube distended; laparoscopic salpingectomy
            serial beta hCG to zero, Rh immune globulin
            abnormal Pap smear; high-grade cervical dysplasia
            acetowhite epithelium at the transformation zone; loop excision of the cervix
            repeat Pap smear in {4-6} months
            headache and swelling at {33-36} weeks; severe preeclampsia
            brisk reflexes, 3+ protein, reactive fetal tracing; induction of labor with oxytocin and magnesium
            magnesium for {24-48} hours after delivery, fetal monitoring
            vaginal bulge and urine leakage on coughing; cystocele with stress incontinence
            anterior vaginal wall descends to the introitus; anterior repair with midurethral sling
            pelvic floor exercises, vaginal estrogen cream
        """,
        "validation": """
            vaginal discharge with fever and pelvic pain; tubo-ovarian abscess
            tender cervix and uterus, complex adnexal mass; laparoscopic drainage of the tube and ovary
            doxycycline and screening of partners
            irregular cycles, acne and two years of infertility; polycystic ovary syndrome
            enlarged ovaries with many follicles; hysterosalpingogram
            clomiphene on cycle days 5 to 9, metformin
            baby moving less at {35-37} weeks; fetal growth restriction
            fundal height {29-31} cm, low amniotic fluid; amniocentesis
            betamethasone, delivery if the tracing worsens
        """,
        "test": """
            cramps and passage of tissue at {9-12} weeks; incomplete miscarriage
            open cervix with products of conception, uterus {8-10} weeks size; suction dilation and curettage
            nothing in the vagina for two weeks, call for heavy bleeding
            dull pelvic pain with a {6-11} cm ovarian mass; dermoid of the {left|right} ovary
            smooth mobile adnexal mass, uterus normal size; laparoscopic ovarian cystectomy
            follow pelvic ultrasound and menstrual cycles for {3-6} months
            two earlier cesareans, scheduled at {38-39} weeks; breech presentation
            live infant, Apgars 8 and 9, clear amniotic fluid; repeat cesarean delivery
            breastfeeding, postpartum visit for mother and baby
            painful periods and trouble conceiving; endometriosis
            dark implants behind the uterus and on both ovaries; laparoscopy with fulguration
            oral contraceptive, referral for infertility
        """,
    },
    "Hematology - Oncology": {
        "train": """
            a breast lump found on self-examination; infiltrating ductal carcinoma of the {left|right} breast
            firm {2-4} cm mass, estrogen receptor positive; mastectomy with sentinel lymph node biopsy
            radiation to the tumor bed, then tamoxifen
            night sweats, weight loss and enlarged neck nodes; Hodgkin lymphoma
            rubbery lymph nodes to {3-5} cm, Reed-Sternberg cells; excisional lymph node biopsy
            next chemotherapy cycle in {2-3} weeks with antiemetics
            fatigue, easy bruising and bleeding gums; acute myeloid leukemia
            {40-80} percent blasts, platelets {9-30} thousand; bone marrow aspiration and biopsy
            transfuse platelets below 10, growth factor for neutropenia
            anemia with bone pain and high protein; multiple myeloma
            monoclonal spike of {3.1-5.9} grams, lytic lesions; autologous stem cell transplant
            lenalidomide maintenance, monthly protein levels
            weight loss and cough; stage IV adenocarcinoma of the lung
            liver metastases, tumor positive for EGFR; infusion port for carboplatin and pemetrexed
            restaging PET scan, tumor board, antiemetics
            pallor and craving for ice; iron deficiency anemia
            hemoglobin {6.8-8.9}, ferritin {3-9}, microcytosis on the smear; bone marrow biopsy with iron stain
            oral iron, weekly blood counts until hemoglobin is normal
            pain crisis in the back and legs; sickle cell disease
            sickled cells on the smear, hemoglobin {6.1-7.9}; exchange transfusion by femoral line
            hydroxyurea, folate and transfusion for hemoglobin below 6
            a second unprovoked clot in the calf; factor V Leiden
            homozygous mutation, D-dimer {2.2-4.9}; vena cava filter placement
            lifelong warfarin, family testing for the clotting mutation
        """,
        "validation": """
            itching after hot showers and a ruddy face; polycythemia vera
            hematocrit {56-63} percent, platelets high, JAK2 mutation; therapeutic phlebotomy
            low-dose aspirin, hematocrit under 45
            sore tongue and tingling feet; pernicious anemia
            hemoglobin {7.1-8.8}, large neutrophils on the smear; marrow aspirate from the iliac crest
            monthly B12 shots, recheck the smear
            a growing mass deep in the thigh; soft tissue sarcoma
            high-grade tumor, no metastases, lymph nodes clear; wide resection with radiation catheters
            doxorubicin with ifosfamide, cardiac echo before
        """,
        "test": """
            follow-up after resection of a cancer of the colon; node-positive colon carcinoma
            {3-6} of 18 lymph nodes positive, CEA {6.1-14.9}; port placement for chemotherapy
            oxaliplatin chemotherapy for {6-12} cycles
            petechiae and nosebleeds for {5-9} days; immune thrombocytopenia
            platelets {4-12} thousand, other cell lines normal, no blasts; splenectomy
            prednisone, then rituximab, blood counts twice weekly
            swollen armpit glands on a routine visit; chronic lymphocytic leukemia
            lymphocytes {80-180} thousand, smudge cells, lymph nodes {2-3} cm; bone marrow sampling with flow cytometry
            watchful waiting, blood counts every {3-6} months
            a mole that changed color and bled; malignant melanoma
            Breslow depth {1.2-3.8} mm, enlarged groin nodes; wide excision, sentinel lymph node mapping
            immunotherapy with nivolumab, PET scan for metastases
        """,
    },
    "Neurosurgery": {
        "train": """
            headache and drowsiness {2-4} weeks after a fall; chronic subdural hematoma
            {8-14} mm of midline shift on head CT; burr hole evacuation with subdural drain
            head of bed flat, drain removed on day {1-3}, head CT in the morning
            leg pain and a numb foot; herniated lumbar disc at {L4-L5|L5-S1}
            free disc fragment compressing the nerve root; lumbar laminectomy and microdiscectomy
            walk the same day, no lifting for {4-6} weeks
            neck pain with clumsy hands; cervical stenosis with myelopathy
            cord compression at {C4-C5|C5-C6}, Hoffmann sign; anterior cervical discectomy and fusion with plate
            hard cervical collar, flat films of the fusion
            worst headache of life with neck stiffness; ruptured anterior communicating aneurysm
            subarachnoid blood, Hunt-Hess grade {2-3}; pterional craniotomy with clipping of the aneurysm
            nimodipine, hourly neuro checks in intensive care
            new seizure and {left|right} arm weakness; frontal glioblastoma
            ring-enhancing mass with edema, dura tense; craniotomy with stereotactic tumor resection
            dexamethasone taper, levetiracetam, staples out in {10-14} days
            gait trouble, incontinence and memory loss; normal pressure hydrocephalus
            enlarged ventricles, clear fluid under pressure; ventriculoperitoneal shunt with programmable valve
            shunt valve set at {110-150}, head CT for ventricle size
            loss of side vision on both sides; pituitary macroadenoma
            chiasm lifted by a {18-30} mm sellar tumor; transsphenoidal resection with fat graft
            hormone levels, watch for spinal fluid leak from the nose
            back pain and heavy legs relieved by leaning; lumbar stenosis with spondylolisthesis
            grade I slip, hypertrophied ligamentum flavum; posterior lumbar fusion with pedicle screws
            lumbar corset when out of bed, flat films of the screws
        """,
        "validation": """
            band-like pain and weak legs; thoracic intradural meningioma
            spinal cord displaced by a dural-based mass; thoracic laminectomy with tumor excision
            log-roll precautions, corset for comfort
            disabling hand tremor despite medicines; essential tremor
            stereotactic target in the ventral thalamus, dura opened; burr hole and deep brain stimulator
            head CT for the leads, staples out, program the stimulator
            vomiting and lethargy with an old shunt; shunt malfunction
            proximal catheter clogged, no flow from the ventricle; shunt revision
            shunt series x-rays, external ventricular drain ready
        """,
        "test": """
            electric jabs of the cheek despite carbamazepine; trigeminal neuralgia
            arterial loop indenting the nerve; retrosigmoid craniotomy with microvascular decompression
            wake in intensive care, steroid taper, hearing check
            headache on coughing, numb hands; Chiari malformation with syrinx
            tonsils {8-16} mm below the foramen magnum; suboccipital craniectomy with dural patch
            neck muscle relaxants, no heavy lifting, watch the wound
            unconscious state after a bicycle crash; epidural hematoma
            Glasgow score {6-9}, one dilated pupil, skull fracture; emergency craniotomy and clot evacuation
            intracranial pressure under 20, repeat head CT
            sciatica back again {6-18} months after surgery; recurrent disc herniation at {L3-L4|L4-5}
            scar around the nerve root and thecal sac; redo hemilaminectomy with foraminotomy
            walk with a corset, avoid bending, staples out at {12-15} days
        """,
    },
    "ENT - Otolaryngology": {
        "train": """
            repeated sore throats and loud snoring; chronic tonsillitis with adenoid hypertrophy
            tonsils 3+ and cryptic, adenoids obstructing; tonsillectomy and adenoidectomy
            soft diet and liquids for {7-10} days
            ear pain and repeated ear infections; chronic otitis media with effusion
            dull {left|right} tympanic membrane with mucoid fluid; myringotomy with ventilation tubes
            antibiotic ear drops, keep the ear dry, hearing test in {4-6} weeks
            nasal congestion and facial pressure; chronic sinusitis with nasal polyps
            polyps in the middle meatus, pus in the maxillary sinus; endoscopic sinus surgery with ethmoidectomy
            nasal saline rinses and fluticasone spray
            trouble breathing through the nose; deviated nasal septum
            septum deviated to the {left|right}, large turbinates; septoplasty and turbinate reduction
            nasal splints out in {5-8} days, saline spray
            hoarseness for {2-5} months in a singer; vocal cord nodules
            bilateral nodules at the anterior third of the vocal cords; microlaryngoscopy with excision
            voice rest, humidifier, reflux control
            foul ear drainage and hearing loss; cholesteatoma
            keratin debris in the attic of the ear; tympanoplasty with mastoidectomy
            ear packing out in {2-3} weeks, no nose blowing
            spinning attacks with ringing in the ear; Meniere disease
            low-frequency hearing loss, horizontal nystagmus; steroid injection through the eardrum
            low-salt diet, meclizine, repeat hearing test
            a slow-growing lump in front of the ear; parotid tumor
            mobile {2-3} cm mass, facial nerve intact; superficial parotidectomy
            drain out tomorrow, watch the smile and eye closure
        """,
        "validation": """
            a hole in the eardrum since childhood; tympanic membrane perforation
            central perforation of {30-50} percent, dry middle ear; graft of temporalis fascia
            cotton in the ear when bathing, no diving
            a midline neck lump that moves with the tongue; thyroglossal duct cyst
            {2-3} cm cyst at the hyoid, tonsils and vocal cords normal; Sistrunk operation
            neck dressing for {2-4} days
            noisy breathing and hoarseness; laryngeal papillomatosis
            wart-like growths on both vocal cords; microlaryngoscopy with laser
            laser again in {2-4} months, speech lessons, rest the voice
        """,
        "test": """
            nosebleeds from the {left|right} nostril for two days; posterior epistaxis
            bleeding behind the middle turbinate; endoscopic nasal cautery and packing
            nasal ointment, saline, sneeze with the mouth open
            muffled voice, drooling and throat pain; peritonsillar abscess
            uvula pushed aside by a bulging tonsil, trismus; incision and drainage of the tonsil bed
            gargles, clindamycin, throat check in {2-3} days
            slow hearing loss with normal eardrums; otosclerosis
            air-bone gap of {25-40} decibels, negative Rinne; stapedectomy with piston prosthesis
            no air travel, no water in the ear, hearing test later
            snoring with witnessed pauses in breathing; obstructive sleep apnea
            long palate, large tongue base, apnea index {28-60}; uvulopalatopharyngoplasty
            sleep with the head raised, soft foods, nasal mask at night
        """,
    },
    "Nephrology": {
        "train": """
            fatigue and itching with rising creatinine; end-stage renal disease
            BUN {78-120}, creatinine {7.2-11.8}, potassium {5.4-6.1}; hemodialysis through a tunneled catheter
            dialysis three times a week, dry weight {61-84} kg
            flank pain and blood in the urine; {left|right} ureteral stone
            {5-9} mm stone with hydronephrosis; ureteroscopy with laser lithotripsy and stent
            strain the urine, tamsulosin, drink {2-3} liters
            foamy urine and leg edema; nephrotic syndrome
            protein {4.1-9.8} grams in 24-hour urine, albumin {1.6-2.4}; percutaneous kidney biopsy
            lisinopril, prednisone, repeat urine protein
            little urine since a contrast study; acute kidney injury
            muddy brown casts, creatinine {3.1-5.8}; temporary dialysis catheter placement
            no contrast, follow creatinine and urine output
            high creatinine in a long-standing diabetic; stage 4 chronic kidney disease
            glomerular filtration rate {17-28}, urine albumin high; creation of a radiocephalic arteriovenous fistula
            low-potassium diet, phosphate binder, erythropoietin
            poor flow during dialysis; clotted dialysis graft
            no thrill over the {left|right} forearm access; graft thrombectomy with angioplasty
            fistulogram in {3-6} months, resume dialysis tomorrow
            a renal mass found by chance; renal cell carcinoma
            {4-7} cm solid mass of the upper pole, vein free; laparoscopic nephrectomy
            CT of the other kidney in {3-6} months, creatinine weekly
            weakness after a missed dialysis; severe hyperkalemia
            potassium {6.8-7.9}, peaked T waves; calcium gluconate, insulin and urgent hemodialysis
            potassium every four hours, dialysis teaching
        """,
        "validation": """
            dull flank ache and recurrent urine infections; staghorn stone
            branched stone filling the renal pelvis; percutaneous lithotomy with a tract to the lower pole
            potassium citrate and a metabolic stone screen
            dark urine after a marathon; rhabdomyolysis
            creatine kinase {22-68} thousand, urine dipstick positive; temporary line for filtration
            saline at {150|200|250} mL an hour, follow muscle enzymes
            confusion with a sodium of {112-118}; inappropriate antidiuretic hormone
            urine osmolality {480-620}, euvolemic; central line for hypertonic saline
            fluid restriction to {800|1000} mL, sodium every six hours
        """,
        "test": """
            rising creatinine {4-9} months after a kidney transplant; acute allograft rejection
            tubulitis on the core, tacrolimus level {3.1-4.9}; biopsy of the transplanted kidney
            methylprednisolone pulses, trend creatinine daily
            cola-colored urine after a sore throat; glomerulonephritis
            red cell casts, low complement, creatinine {2.2-3.4}; renal biopsy with immunofluorescence
            losartan, limit salt, urine sediment again
            bilateral flank fullness, mother on dialysis; polycystic kidney disease
            both kidneys enlarged by cysts, clear urine; cyst aspiration under ultrasound
            refer for transplant listing, blood pressure under 130
            cloudy dialysate and belly pain; peritonitis of peritoneal dialysis
            dialysate white cells {400-2500}, exit site red; exchange of the dialysis catheter
            antibiotics in the dialysate, hemodialysis for {2-4} weeks
        """,
    },
    "Psychiatry / Psychology": {
        "train": """
            low mood, poor sleep and loss of interest; major depressive disorder
            flat affect, slowed movements, denies suicidal thoughts; cognitive behavioral therapy session
            sertraline {50|100|150} mg, weekly therapy
            hearing voices and believing the neighbors plot; paranoid schizophrenia
            guarded, loose associations, poor insight; admission to the locked ward
            risperidone at bedtime, family meeting
            little need for sleep and reckless spending; bipolar disorder, manic
            pressured speech, flight of ideas, grandiose mood; mood chart and lithium level
            lithium {600|900} mg with a level in one week
            sudden spells of terror in crowds; panic disorder with agoraphobia
            anxious mood, fidgeting, thought process logical; breathing retraining and exposure therapy
            paroxetine, relaxation homework, therapy weekly
            nightmares and flashbacks since combat; posttraumatic stress disorder
            hypervigilant, startles easily, affect constricted; trauma-focused therapy
            prazosin at bedtime, veterans group therapy
            drinking a pint of vodka daily; alcohol dependence
            tremulous, oriented, no hallucinations; detoxification with lorazepam
            group therapy and relapse prevention, thiamine
            unfinished tasks and distractibility since school; attention deficit disorder
            restless, interrupts, judgment fair; attention rating scales
            methylphenidate in the morning, return in {3-6} weeks
            an overdose of pills after an argument; borderline personality disorder
            tearful, superficial cuts, labile affect, regrets the act; one-to-one suicide observation
            suicide safety plan, return sooner if mood worsens
        """,
        "validation": """
            months of grief after a divorce; adjustment disorder
            cooperative, sad mood, future-oriented; supportive counseling
            bereavement group, mirtazapine at night
            believing that insects live under the skin; delusional disorder
            fixed false belief, poor insight, anxious mood, no voices; interview with collateral history
            olanzapine {5|10} mg, outreach team
            losing wages at the casino and low mood; pathological gambling
            anxious affect, thought process coherent, denies suicidal plans; motivational therapy
            therapy group for gamblers, naltrexone
        """,
        "test": """
            hours of handwashing each day; obsessive-compulsive disorder
            intrusive thoughts about germs, insight good, anxious affect; exposure with response prevention
            fluoxetine {20|40|60} mg, therapy twice weekly
            refusal to eat from fear of becoming fat; anorexia nervosa
            distorted body image, restricted affect, denies hallucinations; supervised meals and family therapy
            weights each morning, family sessions, watch mood
            mute, refusing food, failed three antidepressants; depression with catatonic features
            waxy posture, blunted affect, no spontaneous speech; bilateral electroconvulsive therapy
            treatments on alternate days, monitor mood and memory
            craving cocaine and irritable mood; stimulant dependence
            paranoid ideas clearing, judgment poor, thought linear; drug counseling intake
            residential rehabilitation, relapse contract, group
        """,
    },
    "Ophthalmology": {
        "train": """
            halos around lights and gradual loss of side vision; primary open-angle glaucoma
            intraocular pressure {26-36}, cup-to-disc ratio 0.8; trabeculectomy with mitomycin of the {left|right} eye
            timolol and latanoprost drops, pressure check in {1-4} weeks
            flashes, floaters and a curtain over one eye; retinal detachment
            superior horseshoe tear of the retina, macula on; vitrectomy with scleral buckle and gas
            eye shield at night, face-down positioning
            red painful eye in a contact lens wearer; corneal ulcer
            {2-4} mm corneal infiltrate with hypopyon; corneal scraping for culture
            moxifloxacin drops hourly, no contact lenses
            wavy lines in the center of vision; wet macular degeneration
            subretinal fluid and drusen, visual acuity 20/{80|100|200}; intravitreal injection of bevacizumab
            Amsler grid daily, repeat injection in {4-6} weeks
            heavy upper lids that block the view; dermatochalasis
            lid skin resting on the lashes of both eyes; upper eyelid blepharoplasty
            ice to the eyelids, antibiotic ointment, sutures out in a week
            blurry sight in poorly controlled diabetes; proliferative diabetic retinopathy
            new vessels at the optic disc, vitreous blood; panretinal laser photocoagulation
            sugar control, dilated retina check in {2-4} months
            double vision and eyes that cross; esotropia
            {25-40} prism diopters of esotropia, full ductions; recession of the medial rectus muscles
            patching of the straight eye, prism glasses
            a firm bump on the eyelid; chalazion
            nodule of the tarsal plate, cornea clear; incision and curettage of the eyelid
            warm compresses and lid hygiene
        """,
        "validation": """
            fleshy growth creeping over the white of the eye; pterygium
            wing of tissue {3-4} mm onto the cornea; excision with conjunctival autograft
            sunglasses and preservative-free tears
            distorted sight despite rigid lenses; keratoconus
            conical thinning with Vogt striae; corneal cross-linking
            corneal topography in {3-6} months
            a red eye with ache and light sensitivity; anterior uveitis
            cells and flare, corneal deposits, visual acuity 20/{40|50|60}; periocular steroid injection
            prednisolone eye drops, dilating drops at night, pressure check
        """,
        "test": """
            glare while driving at night; nuclear sclerotic cataract
            lens opacity 3+, best visual acuity 20/{70|80|100}; phacoemulsification with intraocular lens
            antibiotic and steroid drops, eye patch, new glasses later
            sudden painless blur of the {left|right} eye; central retinal vein occlusion
            flame hemorrhages in all quadrants, macular edema; steroid implant into the vitreous
            optical coherence tomography of the macula in {4-8} weeks
            constant tearing and a sticky inner corner; blocked tear duct
            reflux of mucus on pressing the lacrimal sac; dacryocystorhinostomy
            lid massage, ointment, silicone tube out in {8-12} weeks
            severe brow ache, halos and nausea; acute angle closure
            pressure {48-62}, mid-dilated pupil, cloudy cornea; laser iridotomy
            pilocarpine drops, acetazolamide, treat the fellow eye
        """,
    },
    "Pediatrics - Neonatal": {
        "train": """
            spitting up after every bottle; reflux of infancy
            gaining {18-28} grams a day, abdomen soft, fontanelle flat; feeding observation with the mother
            smaller feeds, upright after the bottle, weight check
            yellow skin while breastfed; breast milk jaundice
            total bilirubin {12-18}, icteric to the thighs, good suck; phototherapy under double lights
            recheck bilirubin, mother to nurse more often
            projectile vomiting after feeds; pyloric stenosis
            olive-sized mass, sunken fontanelle, weight below birth weight; pyloromyotomy
            formula every {2-3} hours, weight check in two days
            apnea after birth at {27-31} weeks; prematurity with respiratory distress
            grunting and retractions, birth weight {980-1600} grams; surfactant and nasal CPAP in the nursery
            caffeine, tube feeds of mother's milk, head ultrasound
            fever and fussiness since yesterday; possible sepsis of the newborn
            fontanelle soft, mottled skin, weak suck; blood, urine and spinal fluid cultures
            ampicillin and gentamicin until cultures are negative
            a routine well-baby visit; healthy term infant
            weight at the {25-75}th percentile, smiles and lifts head; hepatitis B vaccine and growth chart
            back to sleep, car seat, vaccines at two months
            runny nose, cough and fast breathing with poor feeding; RSV bronchiolitis
            nasal flaring, wheezes, {4-5} wet diapers a day; bulb suction and nasal swab
            saline nose drops, small frequent feeds, parents to return if worse
            a hip click at the newborn check; hip dysplasia of infancy
            positive Ortolani on the {left|right}, uneven thigh folds; Pavlik harness fitting
            hip ultrasound in {4-6} weeks, diapering taught to the mother
        """,
        "validation": """
            lumpy scalp after a vacuum birth; cephalohematoma
            swelling stops at the suture line, moves all limbs; head measurements by the nurse
            tell the parents it fades in {4-8} weeks
            blue color and green-stained fluid at birth; meconium aspiration
            Apgars {3-4} and 7, coarse breath sounds; suction below the cords under a warmer
            wean the oxygen hood, gavage nutrition
            slow growth and sleepy feeds; failure to thrive
            fell from the 40th to the {3-5}th percentile, thin arms; calorie count with the lactation nurse
            fortified milk, weigh every morning
        """,
        "test": """
            white mouth patches and fussy nursing; oral thrush
            plaques on the tongue that bleed when wiped, diaper rash; nystatin to mouth and diaper area
            sterilize bottles and nipples, visit again in {5-9} days
            evening crying spells for {2-4} hours; infantile colic
            calm in the arms of the mother, good weight gain, soft belly; soothing and burping lesson
            keep a feeding log, parents reassured, same formula
            jitters, mother with gestational diabetes; low blood sugar of the newborn
            birth weight {4100-4800} grams, glucose {24-36}; dextrose drip in the nursery
            feed every two hours, glucose before each bottle
            the two-week check-up; growing infant, born at term
            length and head circumference at the {40-60}th percentile; newborn hearing screen and heel-stick blood spot
            next vaccines on schedule, vitamin D drops
        """,
    },
    "Radiology": {
        "train": """
            cough and fever; {left|right} lower lobe air-space disease
            patchy opacity, heart size normal, no pneumothorax; two-view chest radiograph, PA and lateral
            follow-up radiograph in {4-8} weeks to confirm clearing
            right lower quadrant pain; findings compatible with appendicitis
            dilated appendix with fat stranding, no free air; CT of the abdomen and pelvis with intravenous contrast
            findings telephoned to the ordering physician
            headache and weakness; acute infarct, no hemorrhage
            restricted diffusion in the {left|right} parietal lobe; MRI of the brain with gadolinium, axial FLAIR
            follow-up MRI as clinically indicated
            knee pain after injury; tear of the medial meniscus
            abnormal signal reaching the articular surface; MRI of the knee, sagittal and coronal sequences
            clinical correlation is suggested
            annual screening; BI-RADS category 2, benign
            scattered densities, no suspicious calcifications; bilateral digital mammogram, CC and MLO views
            routine mammogram in one year
            right upper quadrant pain; gallstones without wall thickening
            echogenic foci with posterior shadowing, duct {3-5} mm; gray-scale ultrasound of the abdomen
            no further imaging needed
            staging of known prostate or breast cancer; multiple osseous metastases
            increased uptake in ribs, spine and pelvis; whole-body bone scan with {20-25} mCi technetium
            CT of the painful areas is suggested
            neck pain after a collision; no acute fracture or malalignment
            vertebral heights preserved, soft tissues normal; CT of the cervical spine with sagittal reformations
            flexion views if symptoms persist
        """,
        "validation": """
            chest pain with hypoxia; no filling defect to the segmental level
            contrast bolus adequate, lungs clear, no effusion; CT angiogram of the chest, {1-2} mm slices
            report discussed with the covering resident
            trouble swallowing solids; mild dysmotility
            barium passes freely, no mass or ring; double-contrast esophagram under fluoroscopy
            comparison with outside films would help
            a palpable thyroid nodule; TI-RADS {3-4} nodule
            {12-19} mm hypoechoic nodule, smooth margin; high-frequency sonogram of the neck
            needle sampling under sonographic guidance
        """,
        "test": """
            leg swelling; occlusive thrombus of the femoral vein
            noncompressible vein without color flow; duplex ultrasound of the {left|right} leg, gray-scale and spectral
            results called to the referring physician at {2-9} p.m.
            smoking history; suspicious nodule of the upper lobe
            spiculated {9-17} mm nodule, no enlarged hilar nodes; low-dose CT of the chest, thin axial images
            PET-CT or short-interval follow-up imaging advised
            low back pain; disc protrusion at {L4-L5|L5-S1}, mild stenosis
            loss of T2 signal in the disc, conus normal; MRI of the lumbar spine, sagittal STIR and axial T2
            correlate with the dermatome of the symptoms
            wrist pain after a fall; nondisplaced scaphoid fracture
            lucent line through the waist, alignment normal; radiograph of the wrist, four views
            repeat films or MRI in {7-10} days
        """,
    },
}

# Lines that any specialty may dictate: they carry no cue, and each pool has its own wording.
GENERIC: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "infant": ("{2-7}-week-old {boy|girl}", "{2-6}-week-old infant {boy|girl}"),
        "opening": (
            "this is a {person} with {complaint}",
            "the patient is a {person} who presents with {complaint}",
            "{person} referred for {complaint}",
            "{complaint} in this {person}",
        ),
        "vitals": (
            "blood pressure {108-148}/{62-90}, pulse {58-96}, respirations {12-20}",
            "BP {104-152}/{60-92}, heart rate {56-98}, weight {118-242} pounds",
            "temperature {97.2-99.4}, pulse {60-98}, blood pressure {110-144}/{64-88}",
        ),
        "infant_vitals": (
            "temperature {97.6-99.2}, pulse {122-158}, respirations {32-48}",
            "heart rate {118-160}, weight {2.6-5.2} kg, temperature {98.0-99.4}",
        ),
        "history": (
            "hypertension",
            "asthma",
            "arthritis of the knees",
            "migraine",
            "acid reflux",
            "breast cancer",
            "kidney stones",
            "depression",
            "glaucoma",
            "hearing loss",
            "lumbar disc disease",
            "coronary artery disease",
        ),
        "allergies": ("no known drug allergies", "penicillin, which causes a rash"),
        "anesthesia": ("general endotracheal", "per the anesthesia record"),
        "consent": (
            "risks, benefits and alternatives were explained and the consent was signed",
            "after informed consent the patient was prepped and draped",
        ),
        "blood_loss": ("{5-90} mL", "about {10-80} cc"),
        "complications": ("none", "no immediate complications"),
        "comparison": ("none available", "prior study of {2-11} months ago"),
    },
    "validation": {
        "infant": ("{2-9}-day-old {boy|girl}", "baby {boy|girl} {3-12} days old"),
        "opening": ("{person} evaluated for {complaint}", "evaluation of this {person} for {complaint}"),
        "vitals": (
            "pulse {60-95} and regular, pressure {112-146} over {66-88}",
            "oral temperature {97.3-99.2}, respirations {13-19}, pulse {62-94}",
        ),
        "infant_vitals": ("pulse {124-156}, respirations {34-46}, weight {2.8-5.6} kg",),
        "history": (
            "gout",
            "shingles",
            "anemia",
            "hiatal hernia",
            "bronchitis",
            "anxiety",
            "cataract",
            "sinus trouble",
        ),
        "allergies": ("codeine intolerance", "denies any allergy"),
        "anesthesia": ("monitored anesthesia care", "general with laryngeal mask"),
        "consent": ("questions were answered and written permission obtained",),
        "blood_loss": ("less than {20-90} mL", "approximately {10-80} milliliters"),
        "complications": ("none encountered", "the course was uneventful"),
        "comparison": ("report of {2-5} years ago", "no earlier examination"),
    },
    "test": {
        "infant": ("newborn {boy|girl} of {9-28} days", "infant {boy|girl} of {9-28} days"),
        "opening": (
            "{person} seen today for {complaint}",
            "we saw this {person} because of {complaint}",
            "{person} whose chief problem is {complaint}",
        ),
        "vitals": (
            "P {58-98}, R {12-20}, BP {106-150}/{60-92}",
            "stable with a heart rate of {60-96} and a pressure of {108-148}/{62-90}",
            "afebrile, pulse {58-94}, BP {112-146} systolic",
        ),
        "infant_vitals": ("P {120-158}, R {30-50}, weight {2.9-5.4} kg", "afebrile, heart rate of {120-156}"),
        "history": (
            "high cholesterol",
            "type 2 diabetes",
            "gallbladder removal",
            "seizures in youth",
            "lymphoma in remission",
            "knee arthroscopy",
            "a small stroke",
            "heart murmur",
            "recurrent urine infections in youth",
            "panic attacks",
        ),
        "allergies": ("NKDA", "sulfa, with hives"),
        "anesthesia": ("total intravenous", "see the anesthesia sheet"),
        "consent": (
            "the procedure was described and the patient agreed to proceed",
            "a time-out was held after consent",
        ),
        "blood_loss": ("minimal, under {15-95} mL", "estimated at {10-90} mL"),
        "complications": ("nil", "none, tolerated well"),
        "comparison": ("examination of last {spring|fall}", "study from {3-14} weeks earlier"),
    },
}
